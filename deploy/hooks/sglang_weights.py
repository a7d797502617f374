#!/usr/bin/env python3
"""An SGLang server takes the new weights from disk; what it is at is finished first.

    [hooks]
    published = [["/path/to/sglang_weights.py", "http://127.0.0.1:30000", "{folder}", "{head}/{version}"]]

Written for SGLang 0.5: `POST /update_weights_from_disk` with `weight_version`, which `/model_info` then tells.
Tested against a receiver that answers as it does; never run against SGLang itself. The server sees the home under the
same path. It must have been started with a model of the same architecture: config and tokenizer stay as they were.
"""

import sys

from asking import ask_sglang

url, folder, name = sys.argv[1:]
ask_sglang(f"{url}/update_weights_from_disk", {"model_path": folder, "weight_version": name, "flush_cache": True})
print(f"{url} serves {name}")
