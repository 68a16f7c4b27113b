#!/bin/sh
# Stands for systemd in a test node, which has none: starts services as their unit files say.
#
# usage: systemctl daemon-reload | enable --now UNIT | restart UNIT | stop UNIT | is-active UNIT
#
# Read from a unit: ExecStartPre, ExecStart, UMask, StateDirectory, RuntimeDirectory, LimitNOFILE.
# A service that notifies (Type=notify; here only containerd) counts as started once it answers.
set -eu

die() {
	echo "systemctl: $*" >&2
	exit 1
}

# Sets `unit` to the name of a unit and `file` to its file.
find_unit() {
	unit=${1%.service}
	for directory in /etc /usr/local/lib /usr/lib; do
		file=$directory/systemd/system/$unit.service
		[ ! -f "$file" ] || return 0
	done
	die "Unit $unit.service not found."
}

value() {
	sed -n "s/^$1=//p" "$file"
}

stop() {
	[ -f "/run/$unit.pid" ] || return 0
	pid=$(cat "/run/$unit.pid")
	! kill "$pid" 2> /dev/null || while kill -0 "$pid" 2> /dev/null; do sleep 0.1; done
	rm "/run/$unit.pid"
}

start() {
	for directory in $(value StateDirectory); do
		install -d -m "$(value StateDirectoryMode)" "/var/lib/$directory"
	done
	for directory in $(value RuntimeDirectory); do
		install -d -m "$(value RuntimeDirectoryMode)" "/run/$directory"
	done
	value ExecStartPre | while read -r command; do
		# A leading "-": the command may fail.
		sh -c "${command#-}" > /dev/null 2>&1 || [ "$command" != "${command#-}" ] \
			|| die "ExecStartPre failed: $command"
	done
	command=$(value ExecStart)
	umask=$(value UMask)
	limit=$(value LimitNOFILE)
	[ "$limit" != infinity ] || limit=
	setsid sh -c "umask ${umask:-0022}; ulimit -n ${limit:-65536} 2> /dev/null || :
		echo \$\$ > /run/$unit.pid; exec $command" > "/var/log/$unit.log" 2>&1 < /dev/null &
	for _ in $(seq 100); do
		sleep 0.1
		[ -f "/run/$unit.pid" ] || continue
		kill -0 "$(cat "/run/$unit.pid")" 2> /dev/null || die "$unit ended: $(cat "/var/log/$unit.log")"
		[ "$(value Type)" = notify ] || return 0
		! ctr version > /dev/null 2>&1 || return 0
	done
	die "$unit does not start: $(cat "/var/log/$unit.log")"
}

case "$*" in
daemon-reload) ;;
"enable --now "*) find_unit "$3" && stop && start ;;
"restart "*) find_unit "$2" && stop && start ;;
"stop "*) find_unit "$2" && stop ;;
"is-active "*)
	find_unit "$2"
	kill -0 "$(cat "/run/$unit.pid" 2> /dev/null)" 2> /dev/null || { echo inactive && exit 3; }
	echo active
	;;
*) die "not understood here: $*" ;;
esac
