#!/usr/bin/env python3
"""A vLLM server takes the new adapter in the place of the one of that name.

    [hooks]
    published = [["/path/to/vllm_adapter.py", "http://127.0.0.1:8000", "{adapter}", "merged"]]

Written for vLLM 0.10 to 0.32, started with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1: `POST
/v1/load_lora_adapter` with `load_inplace`. One that does not know the word says that the adapter is there already:
then `POST /v1/unload_lora_adapter` comes before, and requests for that name fail for a moment. Tested against a
receiver that answers as both do; never run against vLLM itself. The head needs an adapter beside its weights:
`[heads.main.adapter]`.
"""

import sys

from asking import ask, fail

url, adapter, name = sys.argv[1:]
body = {"lora_name": name, "lora_path": adapter, "load_inplace": True}
answer = ask(f"{url}/v1/load_lora_adapter", body, refusals=(400,))
if "already been loaded" in str(answer):
    ask(f"{url}/v1/unload_lora_adapter", {"lora_name": name})
    answer = ask(f"{url}/v1/load_lora_adapter", body)
if not isinstance(answer, str):
    fail(url, answer)
print(answer)
