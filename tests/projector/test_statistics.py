"""What `projector.statistics` computes, against the definitions: one example at a time, in float64, all in memory."""

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from projector.errors import BadValues
from projector.statistics import Batch, fisher_diagonal, input_grams, sampled_nll

INPUTS, CLASSES, EXAMPLES = 5, 4, 24


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (examples, inputs) and labels (examples,)."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(EXAMPLES, INPUTS, generator=draw), torch.randint(CLASSES, (EXAMPLES,), generator=draw)


def batches(size: int) -> list[Batch]:
    x, y = data()
    return [(x[n : n + size], y[n : n + size]) for n in range(0, EXAMPLES, size)]


def classifier(seed: int = 1) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(INPUTS, CLASSES)


def empirical(model: nn.Module, example: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(example[0]), example[1])


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("size", [1, 5, EXAMPLES])
def test_the_fisher_is_the_mean_of_squares_whatever_the_batch_size(size: int) -> None:
    """For softmax regression the gradient of one example is (p - onehot) x', written out here."""
    model = classifier()
    x, y = data()
    weight, bias = model.weight.detach().double(), model.bias.detach().double()
    errors = (x.double() @ weight.T + bias).softmax(-1) - nn.functional.one_hot(y, CLASSES)
    found = fisher_diagonal(model, batches(size), empirical)
    assert found.keys() == {"weight", "bias"}
    assert relative(found["weight"], (errors[:, :, None] * x.double()[:, None, :]).square().mean(0)) < 1e-6
    assert relative(found["bias"], errors.square().mean(0)) < 1e-6


def test_the_fisher_of_a_deeper_model_is_autograds_one_example_at_a_time() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(INPUTS, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, CLASSES))
    found = fisher_diagonal(model, batches(8), empirical)
    model.double()
    wanted = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    for x, y in zip(*data(), strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(x.double()[None]), y[None]).backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None
            wanted[name] += weight.grad.square() / EXAMPLES
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype is torch.float32
        assert relative(found[name], values) < 1e-5, name


def test_labels_drawn_from_the_model_give_the_fisher_information() -> None:
    """Its expectation over the labels is known here: E[(p - onehot)^2] = p (1 - p), for each class."""
    model = classifier()
    x, _ = data()
    p = (x.double() @ model.weight.detach().double().T + model.bias.detach().double()).softmax(-1)
    wanted = (p * (1 - p)).mean(0)
    draw = torch.Generator().manual_seed(3)
    many = [x.repeat(100, 1)]

    def loss(model: nn.Module, example: Batch) -> Tensor:
        assert isinstance(example, Tensor)
        return sampled_nll(model(example), draw)

    assert relative(fisher_diagonal(model, many, loss)["bias"], wanted) < 0.05
    assert relative(fisher_diagonal(model, batches(8), empirical)["bias"], wanted) > 0.1  # it is another quantity


def test_labels_are_drawn_as_often_as_the_model_predicts_them() -> None:
    p = torch.tensor([0.6, 0.3, 0.1])
    draw = torch.Generator().manual_seed(4)
    logits = p.log().expand(1, 20_000, 3)  # one text of 20,000 tokens
    entropy = float(-(p * p.log()).sum())
    assert float(sampled_nll(logits, draw)) / 20_000 == pytest.approx(entropy, rel=0.02)
    again = [float(sampled_nll(logits, torch.Generator().manual_seed(5))) for _ in range(2)]
    assert again[0] == again[1]


def test_the_grams_are_those_of_the_layers_inputs() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(INPUTS, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    x = torch.randn(3, 8, INPUTS)  # three batches' worth of (examples, tokens, inputs)
    found = input_grams(model, [x[:1], x[1:]])
    first = x.flatten(0, 1)
    second = model[1](model[0](first)).detach().double()
    assert found.keys() == {"0", "2"}
    for name, rows in (("0", first.double()), ("2", second)):
        assert found[name].dtype is torch.float64
        assert relative(found[name], rows.T @ rows / len(rows)) < 1e-6


class Twice(nn.Module):
    """A layer used twice, once by keyword; one never; one tied to another; a frozen one; a buffer; dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(INPUTS, INPUTS)
        self.used = nn.Linear(INPUTS, INPUTS, bias=False)
        self.never = nn.Linear(INPUTS, INPUTS, bias=False)
        self.tied = nn.Linear(INPUTS, INPUTS, bias=False)
        self.tied.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(INPUTS)
        self.dropout = nn.Dropout(0.5)
        self.used.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        once: Tensor = self.used(x)
        return self.tied(self.norm(self.dropout(self.used(input=once))))


def test_layers_used_twice_never_or_tied() -> None:
    torch.manual_seed(6)
    model = Twice()
    x, _ = data()
    found = input_grams(model, [x])
    once = model.used(x).detach()
    rows = torch.cat([x, once]).double()
    assert found.keys() == {"used"}
    assert relative(found["used"], rows.T @ rows / len(rows)) < 1e-6


def test_frozen_weights_count_and_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(7)
    model = Twice()
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (x, _), one = data(), (lambda model, example: model(example).square().sum())
    found = fisher_diagonal(model, [x], one)
    again = fisher_diagonal(model, x.split(7), one)
    assert found.keys() == {
        *("embed.weight", "used.weight", "never.weight", "norm.weight", "norm.bias"),
        *("norm.running_mean", "norm.running_var"),  # a checkpoint has them, a gradient they have not
    }
    assert all(torch.equal(found[name], again[name]) for name in found)  # no dropout
    assert found["used.weight"].min() > 0 and not model.used.weight.requires_grad
    assert not found["never.weight"].any() and not found["norm.running_var"].any()
    assert model.training and model.dropout.training and not model.norm.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.used._forward_pre_hooks


def test_after_a_failure_the_model_is_as_it_was() -> None:
    model = Twice()
    for compute in (lambda: fisher_diagonal(model, [torch.ones(2, 3)], empirical), lambda: input_grams(model, ["x"])):
        with pytest.raises((RuntimeError, TypeError, AttributeError, ValueError)):
            compute()
        assert model.training and not model.used.weight.requires_grad and not model.used._forward_pre_hooks


def test_what_cannot_be_computed_is_said() -> None:
    model = classifier()
    x, _ = data()
    with pytest.raises(ValueError, match="there is no example"):
        fisher_diagonal(model, [], empirical)
    with pytest.raises(ValueError, match=r"shape \[1, 4\] for one example"):
        fisher_diagonal(model, [x], lambda model, example: model(example))
    with pytest.raises(ValueError):  # as many labels as inputs
        fisher_diagonal(model, [(x, torch.zeros(3, dtype=torch.int64))], empirical)
    with pytest.raises(BadValues, match="the Fisher of weight is not finite") as caught:
        fisher_diagonal(model, [x * float("inf")], lambda model, example: model(example).sum())
    assert caught.value.hint
    with pytest.raises(ValueError, match=r"is there a batch\?"):
        input_grams(nn.Sequential(model), [])


@pytest.mark.parametrize("tied", [True, False])
def test_the_names_are_those_that_transformers_saves(tied: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    from safetensors import safe_open
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    sides = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30, tie_word_embeddings=tied, **sides))
    model.save_pretrained(folder)
    batch = [{"input_ids": torch.arange(12).reshape(2, 6)}]
    fisher = fisher_diagonal(model, batch, lambda model, example: sampled_nll(model(**example).logits))
    grams = input_grams(model, batch)
    save_file(fisher, folder / "fisher.safetensors")  # shares no memory
    with safe_open(folder / "model.safetensors", "pt") as saved:
        names = set(saved.keys())
        assert {name: list(values.shape) for name, values in fisher.items()} == {
            name: saved.get_slice(name).get_shape() for name in names
        }
    assert {f"{layer}.weight" for layer in grams} <= names
    assert ("lm_head" in grams) is not tied and "model.layers.0.mlp.down_proj" in grams
