#!/bin/sh
# Process 1 of the virtual machine: makes it a host for test nodes, runs one test binary, says how
# it ended, powers off.
#
# `godwit-vm` on the second disk holds WORKSPACE (where that disk belongs: the path that the
# binaries were built in), ROOT (the directory of the nodes' Debian root, which here is the
# machine's own) and RUN (the command line).
set -eu
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
finish() {
	code=$?
	set +e
	# On a line of its own, whatever was printed last.
	printf '\ngodwit-vm: exit code %s\n' "$code"
	sync
	echo o > /proc/sysrq-trigger
	sleep 60
}
trap finish EXIT

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev || true
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
# The sockets' diagnostics are what CRIU asks for connections.
for module in overlay veth bridge loop ifb sch_tbf sch_ingress act_mirred cls_u32 cls_matchall tun unix_diag tcp_diag \
	udp_diag inet_diag netlink_diag af_packet_diag nf_tables iptable_filter; do
	modprobe -q "$module" || echo "godwit-vm: no module $module"
done
ip link set lo up
mount /dev/nvme1n1 /mnt
. /mnt/godwit-vm
mkdir -p "$WORKSPACE"
mount --move /mnt "$WORKSPACE"
mkdir -p "$ROOT"
mount --bind / "$ROOT"
cd "$WORKSPACE"
uname -r
export GODWIT_PATIENCE=10 RUST_BACKTRACE=1
# Not exec, and no error: whatever comes out is said at the end.
sh -c "$RUN" < /dev/null
