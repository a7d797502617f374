"""What test_hub_clients.py runs in a process of its own, with HF_ENDPOINT and HF_TOKEN set: the real clients.

Its arguments are the base and a folder to work in. Each line on its standard output that is JSON is something that
came; it waits for a line on its standard input in between.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any


def told(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def digests(folder: str) -> dict[str, str]:
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read() -> None:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

    AutoModel.from_pretrained("mainstem/main")
    told(first=digests(snapshot_download("mainstem/main")))
    told(tokens=AutoTokenizer.from_pretrained("mainstem/main")("w1 w2")["input_ids"])
    generated = pipeline("text-generation", "mainstem/main", revision="v1")("w1 w2", max_new_tokens=2)
    told(generated=generated[0]["generated_text"])
    base = AutoModelForCausalLM.from_pretrained("mainstem/main", revision="v0")
    tuned = PeftModel.from_pretrained(base, "mainstem/main-adapter", revision="v1")
    told(adapter_loaded=type(tuned).__name__, rank=tuned.peft_config["default"].r)
    told(old=digests(snapshot_download("mainstem/main", revision="v0")))
    told(commit=HfApi().model_info("mainstem/main").sha)
    errors = []
    for repo, name, revision in (
        ("mainstem/main", "none", "main"),
        ("mainstem/main", "config.json", "v99"),
        ("mainstem/none", "config.json", "main"),
        ("google-bert/bert", "config.json", "main"),
    ):
        try:
            hf_hub_download(repo, name, revision=revision)
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            errors.append(type(error).__name__)
    told(errors=errors)


def read_again() -> None:
    from huggingface_hub import snapshot_download
    from transformers import AutoModel

    AutoModel.from_pretrained("mainstem/main")
    told(second=digests(snapshot_download("mainstem/main")))
    told(pinned=digests(snapshot_download("mainstem/main", revision="v1")))


def push(base: Path, folder: Path) -> None:
    import torch
    from huggingface_hub import HfApi, snapshot_download
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    from daemon.trainers import mainstem_callback

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(snapshot_download("mainstem/main", revision="v1"))
    texts = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([3, 4, 5], [6, 7, 8])]
    arguments = TrainingArguments(
        str(folder / "out"),
        max_steps=2,
        save_steps=1,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        push_to_hub=True,
        hub_model_id="mainstem/trained",
        hub_strategy="every_save",
        hub_always_push=True,
        per_device_train_batch_size=1,
    )
    says = mainstem_callback(task="numbers", weight=2, data=["urn:numbers"])
    trainer = Trainer(model, arguments, train_dataset=texts, callbacks=[says])  # type: ignore[arg-type]
    trainer.train()
    told(checkpoint=json.loads((folder / "out/checkpoint-1/expert.json").read_text()))
    trainer.state.is_world_process_zero = False
    says.on_push_begin(TrainingArguments(str(folder / "other")), trainer.state, trainer.control, model=model)
    told(another_process_wrote=(folder / "other").exists())
    trainer.state.is_world_process_zero = True
    told(trained=trainer.push_to_hub().oid)
    tuned = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    AutoTokenizer.from_pretrained(base).push_to_hub("mainstem/model")
    told(model=tuned.push_to_hub("mainstem/model").oid)
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, weight in adapter.named_parameters():
            if "lora_B" in name:
                weight.add_(0.01 * torch.randn_like(weight))
    told(adapter=adapter.push_to_hub("mainstem/adapter").oid)
    told(whoami=HfApi().whoami()["name"])


if __name__ == "__main__":
    read()
    sys.stdin.readline()  # another version is live from here on
    read_again()
    push(Path(sys.argv[1]), Path(sys.argv[2]))
