#!/bin/sh
# Makes a test node out of fresh namespaces and becomes its process 1.
#
# usage: init.sh DIRECTORY ROOT NAME CGROUP...
#   DIRECTORY  the node's state on the host: upper, work, root, containerd, godwit
#   ROOT       the Debian root below the node's overlay
#   CGROUP     NAME:TYPE:OPTIONS of each cgroup hierarchy to mount
#
# Runs inside new mount, UTS, IPC, PID and cgroup namespaces and the node's network namespace.
# Writes its process id, as the host sees it, to DIRECTORY/init.pid when the node is ready.
set -eu
directory=$1 lower=$2 name=$3
shift 3
root=$directory/root
exec 3> "$directory/init.pid"
# The host's /proc is still mounted here, so this is the number that the host knows.
read -r pid rest < /proc/self/stat

mount -t overlay overlay \
	-o "lowerdir=$lower,upperdir=$directory/upper,workdir=$directory/work" "$root"
# Overlay cannot have its upper directory on overlay: what stacks overlays needs the real thing.
mkdir -p "$root/var/lib/containerd" "$root/var/lib/godwit"
mount --bind "$directory/containerd" "$root/var/lib/containerd"
mount --bind "$directory/godwit" "$root/var/lib/godwit"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t sysfs sysfs "$root/sys"
for cgroup in "$@"; do
	[ "${cgroup%%:*}" = . ] || {
		mount -t tmpfs tmpfs "$root/sys/fs/cgroup"
		break
	}
done
for cgroup in "$@"; do
	where=$root/sys/fs/cgroup/${cgroup%%:*}
	type_and_options=${cgroup#*:}
	mkdir -p "$where"
	mount -t "${type_and_options%%:*}" -o "${type_and_options#*:}" cgroup "$where"
done
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"

# Not chroot: under one, runc cannot pivot and CRIU refuses ("another root than mntns").
mkdir -p "$root/host"
cd "$root"
pivot_root . host
umount -l /host
hostname "$name"

if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
	# Version 2 alone: a group with processes cannot give controllers to its children, so processes
	# have a group of their own.
	mkdir -p /sys/fs/cgroup/init
	echo 0 > /sys/fs/cgroup/init/cgroup.procs
fi

echo "$pid" >&3
exec 3>&-
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin tini -- sleep infinity
