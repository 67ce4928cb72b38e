#!/bin/busybox sh
# First process of the guest: loads modules, lays a writable overlay over the host's files (9p,
# read-only), and hands over to guest.sh there.
bb=/bin/busybox
$bb mount -t proc proc /proc; $bb mount -t sysfs sys /sys; $bb mount -t devtmpfs dev /dev
while read -r module; do
  $bb insmod "/mods/$module" || echo "kvferry rdma-vm: module $module does not load"
done < /mods/order
options=trans=virtio,version=9p2000.L,msize=1048576
$bb mount -t 9p -o $options,cache=loose,ro host /lower || echo "kvferry rdma-vm: no host files"
$bb mount -t tmpfs tmpfs /rw; $bb mkdir -p /rw/up /rw/work
$bb mount -t overlay -o lowerdir=/lower,upperdir=/rw/up,workdir=/rw/work overlay /root
for dir in proc sys dev; do $bb mount --move /$dir /root/$dir; done
for dir in dev/shm run; do $bb mkdir -p /root/$dir; $bb mount -t tmpfs tmpfs /root/$dir; done
$bb mkdir /root/run/kvferry
$bb mount -t 9p -o $options,cache=none,rw out /root/run/kvferry || echo "kvferry rdma-vm: no way out"
exec $bb switch_root /root /bin/bash /run/kvferry/guest.sh
