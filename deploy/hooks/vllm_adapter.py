#!/usr/bin/env python3
"""A vLLM server takes the new adapter in the place of the one of that name.

    [hooks]
    published = [["/path/to/vllm_adapter.py", "http://127.0.0.1:8000", "{adapter}", "merged"]]

Written for vLLM 0.10 and later, started with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1: `POST
/v1/unload_lora_adapter`, `POST /v1/load_lora_adapter`. Tested against a receiver that answers as it does; never run
against vLLM itself. Between the two, requests for that name fail for a moment. The head needs an adapter beside its
weights: `[heads.main.adapter]`.
"""

import sys

from asking import ask

url, adapter, name = sys.argv[1:]
ask(f"{url}/v1/unload_lora_adapter", {"lora_name": name}, refusals=(400, 404))  # the first time there is none
print(ask(f"{url}/v1/load_lora_adapter", {"lora_name": name, "lora_path": adapter}))
