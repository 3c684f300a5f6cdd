# The first program of the virtual machine, once it has its files. Makes it a node as programs expect
# one, with an RDMA device in software, runs what the host asks for, and switches the machine off.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/run/home LANG=C.UTF-8
mkdir -p /dev/pts /dev/shm /lib/modules $HOME
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ln -s /proc/self/fd /dev/fd
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ln -s "$(cat /run/vm/kernel)/lib/modules/$(uname -r)" /lib/modules/

echo vm > /proc/sys/kernel/hostname
ip link set lo up
modprobe -a rdma_rxe ib_uverbs rdma_ucm dummy
ip link add rdma0 type dummy
ip address add 10.77.0.1/24 dev rdma0
ip link set rdma0 mtu 4200 up
rdma link add rxe0 type rxe netdev rdma0

sh /run/vm/command < /dev/null
echo $? > /run/vm/status
sync
exec busybox poweroff -f
