#!/bin/sh
# Points a link at the new version, and restarts the server that was started on that link. For any server.
#
#     [hooks]
#     published = [["/path/to/restart.sh", "{folder}", "/srv/models/chat", "systemctl", "restart", "chat.service"]]
#
# The link is swapped at once: there is no moment without it.
set -eu
folder=$1 link=$2
shift 2
ln -s -- "$folder" "$link.new.$$"
mv -T -- "$link.new.$$" "$link"
exec "$@"
