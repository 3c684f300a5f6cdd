#!/bin/sh
# The first program of the virtual machine, from its initial memory disk. Mounts the host's files,
# read-only, with a tmpfs above, and beside them the folder that the host and we share; goes on there.
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "/modules/$module"
done < /modules/order
shared=trans=virtio,version=9p2000.L,msize=262144
mount -t 9p -o "ro,$shared,cache=loose" host /lower &&
    mount -t tmpfs tmpfs /rw &&
    mkdir /rw/upper /rw/work &&
    mount -t overlay -o lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work overlay /root &&
    mount -t tmpfs tmpfs /root/run &&
    mkdir /root/run/vm &&
    mount -t 9p -o "$shared" shared /root/run/vm &&
    mount --move /dev /root/dev &&
    mount --move /proc /root/proc &&
    mount --move /sys /root/sys &&
    exec switch_root /root /bin/sh /run/vm/main.sh
