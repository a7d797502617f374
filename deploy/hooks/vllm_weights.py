#!/usr/bin/env python3
"""FOR DEVELOPMENT ONLY: a vLLM server drops its weights and reads its model's folder again.

    [hooks]
    published = [["/path/to/vllm_weights.py", "http://127.0.0.1:8000"]]

Written for vLLM 0.11 to 0.32, started on the link `published/main/latest` of the home with `--enable-sleep-mode` and
VLLM_SERVER_DEV_MODE=1, whose addresses nobody else may reach: `/sleep`, `/wake_up`, `/collective_rpc`. Tested against a
receiver that answers as it does; never run against vLLM itself. What it is at is aborted. Where that will not do, start
another server on the new folder and turn to it (restart.sh).
"""

import sys

from asking import ask

(url,) = sys.argv[1:]
ask(f"{url}/sleep?level=2")
ask(f"{url}/wake_up?tags=weights")
ask(f"{url}/collective_rpc", {"method": "reload_weights"})
ask(f"{url}/wake_up?tags=kv_cache")
print(f"{url} has read its weights again")
