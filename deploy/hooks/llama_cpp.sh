#!/bin/sh
# Converts the new version to GGUF with llama.cpp's own converter, and restarts llama-server, which was started on that file.
#
#     [hooks]
#     published = [["/path/to/llama_cpp.sh", "/opt/llama.cpp/convert_hf_to_gguf.py", "{folder}", "/srv/models/chat.gguf", "systemctl", "restart", "chat.service"]]
#     timeout_seconds = 3600
#
# Written for llama.cpp of 2026 (gguf 0.19): its `--outfile` and `--outtype`. Its converter was run by hand on a tiny Llama,
# and the tensors were the version's; never run against llama-server itself. The model must be of a kind that the converter
# knows, with a tokenizer that it knows. The file is swapped at once; where converting fails, the one before stays.
set -eu
convert=$1 folder=$2 file=$3
shift 3
trap 'rm -f -- "$file.new"' EXIT
"$convert" --outfile "$file.new" --outtype auto "$folder"
mv -T -- "$file.new" "$file"
exec "$@"
