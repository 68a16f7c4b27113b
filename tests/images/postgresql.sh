#!/bin/sh -e
# As images of PostgreSQL usually do: makes a cluster in /data if there is none, then runs the
# server on it, both as the user postgres. Arguments are the server's.
programs=$(echo /usr/lib/postgresql/*/bin)
if [ "$(id -u)" = 0 ]; then
    mkdir -p /run/postgresql
    chown postgres: /data /run/postgresql
    exec su -s /bin/sh postgres -c 'exec "$0" "$@"' -- "$0" "$@"
fi
if [ ! -e /data/PG_VERSION ]; then
    "$programs/initdb" -D /data --auth=trust --encoding=UTF8 --locale=C --no-sync --wal-segsize=1 >/dev/null
fi
exec "$programs/postgres" -D /data -k /run/postgresql "$@"
