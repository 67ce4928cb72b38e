# Runs on the host's files inside the guest: Soft-RoCE devices on the ends of veth pairs, then the
# command, then power off. `settings` is written by machine.py.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
. /run/kvferry/settings
ulimit -l unlimited; ip link set lo up
echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter; echo 1 > /proc/sys/net/ipv4/conf/all/accept_local
for ((pair = 0; pair < PAIRS; pair++)); do
  one=$((2 * pair)); other=$((one + 1))
  ip link add v$one mtu "$MTU" type veth peer name v$other mtu "$MTU"
  for i in $one $other; do
    ip addr add 10.77.$pair.$((i % 2 + 1))/24 dev v$i
    echo 1 > /proc/sys/net/ipv4/conf/v$i/accept_local
    echo 0 > /proc/sys/net/ipv4/conf/v$i/rp_filter
    ip link set v$i up
  done
  # Each end reaches the other's address through the wire, not through lo: rxe asks for a route out
  # of its own device.
  ip neigh replace 10.77.$pair.2 lladdr "$(cat /sys/class/net/v$other/address)" dev v$one
  ip neigh replace 10.77.$pair.1 lladdr "$(cat /sys/class/net/v$one/address)" dev v$other
  for i in $one $other; do rdma link add rxe$i type rxe netdev v$i; done
done
stty raw -echo < /dev/hvc0
bash /run/kvferry/command > /dev/hvc0 2>&1 < /dev/null
echo $? > /run/kvferry/status
sync; echo o > /proc/sysrq-trigger; read -r -t 5 < /dev/zero
