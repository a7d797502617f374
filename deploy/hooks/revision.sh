#!/bin/sh
# Writes the new version into a file of variables, and restarts the server that reads it. For a server that loads by name,
# from the daemon as a Hub (docs/hub.md).
#
#     [hooks]
#     published = [["/path/to/revision.sh", "mainstem/{head}", "v{version}", "/srv/models/chat.env", "systemctl", "restart", "chat.service"]]
#
# Written for TGI 3.3, whose launcher takes MODEL_ID and REVISION; chat.service has `EnvironmentFile=/srv/models/chat.env`
# and `Environment=HF_ENDPOINT=http://127.0.0.1:8765`. Others take them as arguments: `vllm serve ${MODEL_ID} --revision
# ${REVISION} --tokenizer-revision ${REVISION}`. Tested with a command in the place of systemctl; never run against TGI
# itself.
set -eu
model=$1 revision=$2 file=$3
shift 3
printf 'MODEL_ID=%s\nREVISION=%s\n' "$model" "$revision" > "$file.new.$$"
mv -T -- "$file.new.$$" "$file"
exec "$@"
