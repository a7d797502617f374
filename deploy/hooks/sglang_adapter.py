#!/usr/bin/env python3
"""An SGLang server takes the new adapter in the place of the one of that name.

    [hooks]
    published = [["/path/to/sglang_adapter.py", "http://127.0.0.1:30000", "{adapter}", "merged"]]

Written for SGLang 0.5, started with `--enable-lora`: `POST /unload_lora_adapter`, `POST /load_lora_adapter`. Tested
against a receiver that answers as it does; never run against SGLang itself. Between the two, requests for that name
fail for a moment. The head needs an adapter beside its weights: `[heads.main.adapter]`.
"""

import sys

from asking import ask, ask_sglang

url, adapter, name = sys.argv[1:]
ask(f"{url}/unload_lora_adapter", {"lora_name": name}, refusals=(400,))  # the first time there is none
ask_sglang(f"{url}/load_lora_adapter", {"lora_name": name, "lora_path": adapter})
print(f"{url} serves {adapter} as {name}")
