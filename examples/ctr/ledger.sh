#!/bin/sh
# A container that counts into a file on a block volume, and reads content that is named by its
# digest. `godwit migrate ledger --from THIS-NODE --to OTHER-NODE` moves it.
set -eu

# A file system in a file: its files keep their inode numbers when it moves. The destination must
# list "ext4" in admit.file_systems.
godwit volume create ledger --kind block --size 64M

# Read-only content: any directory. The digest is its name on every node.
content=$(mktemp -d)
echo 'counted by the ledger' > "$content/label"
digest=$(godwit volume import "$content")
rm -r "$content"

ctr images pull --snapshotter godwit docker.io/library/busybox:1 > /dev/null
ctr run -d --runtime io.containerd.runc.godwit.v1 --snapshotter godwit \
	--mount "type=godwit,src=ledger,dst=/ledger,options=rw" \
	--mount "type=godwit,src=$digest,dst=/content,options=ro" \
	docker.io/library/busybox:1 ledger \
	sh -c 'n=0; while :; do n=$((n + 1)); echo "$n $(cat /content/label)" >> /ledger/lines; sleep 1; done'
