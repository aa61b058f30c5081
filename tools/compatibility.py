"""Measures samlite on networks that others wrote, and writes the table into docs/compatibility.md.

    pip install timm torchvision transformers peft torch_geometric curvlinops-for-pytorch scipy
    python tools/compatibility.py [NAME ...]

Each network has random weights, and a few random samples. Its largest eigenvalue is compared with one that knows
nothing of samlite: ARPACK on products by plain autograd in float64, or by differences of the gradient where torch has
a wrong second derivative. Of a large network the eigenpair's residual under such products is taken. M_2 v
says whether samples are taken apart by rules. Times are of one product H v, against curvlinops, the median of several,
one after the other.
"""

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from samlite import Hessian
from samlite.batches import placed

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
BEGIN, END = "<!-- networks: written by tools/compatibility.py -->", "<!-- end of networks -->"
Case = tuple[nn.Module, Any, Callable[[nn.Module, Any], Any]]  # a network, one batch, and its loss
FAMILIES: dict[str, Callable[[], Case]] = {}
LARGE = 300_000  # parameters from which on an eigenpair is checked by its residual
BY_DIFFERENCES = {"weight norm"}  # whose second derivative torch has wrong


def family(name: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Register what makes a case."""

    def register(make: Callable[[], Case]) -> Callable[[], Case]:
        FAMILIES[name] = make
        return make

    return register


# --- The networks


def classified(model: nn.Module, *inputs: Tensor, classes: int = 3) -> Case:
    """Cross-entropy of random labels."""
    batch = (*inputs, torch.randint(0, classes, (len(inputs[0]),)))
    return model, batch, lambda m, b: F.cross_entropy(m(*b[:-1]), b[-1])


def of_timm(name: str, **settings: Any) -> Callable[[], Case]:
    def make() -> Case:
        import timm

        model = timm.create_model(name, num_classes=10, **settings)
        return classified(model, torch.randn(4, 3, 64, 64), classes=10)

    return make


FAMILIES |= {
    "timm resnet18": of_timm("resnet18"),
    "timm convnext": of_timm("convnext_atto"),
    "timm vit": of_timm("vit_tiny_patch16_224", img_size=64),
    "timm swin": of_timm(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24, depths=(1, 1), num_heads=(2, 2)
    ),
    "timm mixer": of_timm("mixer_s32_224", img_size=64),
    "timm efficientnet": of_timm("efficientnet_b0"),
    "timm mobilenetv3": of_timm("mobilenetv3_small_050"),
    "timm regnet": of_timm("regnety_002"),
}


def of_transformers(kind: str, config: str, make_batch: Callable[[], dict[str, Tensor]], **fields: Any) -> Any:
    def make() -> Case:
        import transformers

        model = getattr(transformers, kind)(getattr(transformers, config)(**fields))
        return model, make_batch(), lambda m, b: m(**b).loss

    return make


def tokens(length: int = 12) -> Tensor:
    return torch.randint(3, 50, (4, length))


def text() -> dict[str, Tensor]:
    ids = tokens()
    return {"input_ids": ids, "labels": ids}


def padded() -> dict[str, Tensor]:
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, 8:] = mask[2, 5:] = 0
    return {"input_ids": tokens(), "attention_mask": mask, "labels": torch.randint(0, 3, (4,))}


SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
FAMILIES |= {
    "BERT, padded": of_transformers(
        "BertForSequenceClassification", "BertConfig", padded, **SMALL, num_attention_heads=2, num_labels=3
    ),
    "GPT-2": of_transformers("GPT2LMHeadModel", "GPT2Config", text, vocab_size=50, n_embd=32, n_layer=2, n_head=2),
    "Llama": of_transformers(
        "LlamaForCausalLM", "LlamaConfig", text, **SMALL, num_attention_heads=4, num_key_value_heads=2
    ),
    "T5": of_transformers(
        "T5ForConditionalGeneration",
        "T5Config",
        lambda: {"input_ids": tokens(), "labels": tokens(7)},
        **{"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        decoder_start_token_id=0,
        pad_token_id=0,
    ),
    "ViT": of_transformers(
        "ViTForImageClassification",
        "ViTConfig",
        lambda: {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.randint(0, 3, (4,))},
        **{**SMALL, "vocab_size": 1, "image_size": 16, "patch_size": 4, "num_labels": 3, "num_attention_heads": 2},
    ),
    "Whisper": of_transformers(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        lambda: {"input_features": torch.randn(4, 8, 32), "labels": tokens(7)},
        **{"vocab_size": 50, "num_mel_bins": 8, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
        **{"max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1},
        **{"eos_token_id": 2, "decoder_start_token_id": 1},
    ),
    "Mamba": of_transformers(
        "MambaForCausalLM",
        "MambaConfig",
        text,
        **{"vocab_size": 50, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 2},
    ),
}


@family("LoRA of GPT-2 (peft)")
def lora() -> Case:
    from peft import LoraConfig, get_peft_model

    model, batch, loss = FAMILIES["GPT-2"]()
    return get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)), batch, loss


def of_graphs(convolution: str, **settings: Any) -> Callable[[], Case]:
    def make() -> Case:
        import torch_geometric.nn as gnn
        from torch_geometric.data import Batch, Data

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                kind = getattr(gnn, convolution)
                self.first, self.second, self.out = kind(5, 8), kind(8, 8), nn.Linear(8, 3)

            def forward(self, d: Any) -> Tensor:
                x = torch.tanh(self.second(torch.tanh(self.first(d.x, d.edge_index)), d.edge_index))
                return self.out(gnn.global_mean_pool(x, d.batch, d.num_graphs))

        graphs = [
            Data(x=torch.randn(4 + k, 5), edge_index=torch.randint(0, 4 + k, (2, 9 + k)), y=torch.tensor([k % 3]))
            for k in range(6)
        ]
        return Net(), Batch.from_data_list(graphs), lambda m, b: F.cross_entropy(m(b), b.y)

    return make


FAMILIES |= {"PyG GCN": of_graphs("GCNConv"), "PyG GAT": of_graphs("GATConv"), "PyG GATv2": of_graphs("GATv2Conv")}


def recurrent(kind: type[nn.Module]) -> Callable[[], Case]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = kind(5, 8, 2, batch_first=True, bidirectional=True), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.inner(x)[0][:, -1])

    return lambda: classified(Net(), torch.randn(6, 7, 5))


FAMILIES |= {"LSTM": recurrent(nn.LSTM), "GRU": recurrent(nn.GRU)}


@family("U-Net")
def unet() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=True)
            self.down, self.up, self.out = nn.Conv2d(4, 8, 3, 2, 1), nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(8, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.norm(self.enter(x)))
            return self.out(torch.cat([self.up(F.relu(self.down(h))), h], 1))

    return Net(), (torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)), lambda m, b: F.mse_loss(m(b[0]), b[1])


@family("siamese")
def siamese() -> Case:
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
    batch = torch.randn(6, 5), torch.randn(6, 5), (torch.arange(6) % 2).float()
    return (
        net,
        batch,
        lambda m, b: F.binary_cross_entropy_with_logits(F.cosine_similarity(m(b[0]), m(b[1])), b[2].to(b[0].dtype)),
    )


@family("physics-informed")
def physics() -> Case:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return (bend + batch[1]).square().mean()

    x = torch.linspace(0, 1, 6).unsqueeze(1)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), (x, x.sin()), loss


@family("weight norm")
def normed() -> Case:
    inner = nn.utils.parametrizations.weight_norm(nn.Linear(5, 8))
    return classified(nn.Sequential(inner, nn.Tanh(), nn.Linear(8, 3)), torch.randn(6, 5))


# --- What is measured


class Plain:
    """Products in float64 that know nothing of samlite."""

    def __init__(self, model: nn.Module, batch: Any, loss: Any, differences: bool) -> None:
        self.model, self.loss = _without_hardsigmoid(model.double().eval()), loss
        self.batch = placed(batch, next(model.parameters()))
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.differences = differences

    def gradient(self, create: bool = False) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            value = self.loss(self.model, self.batch)
        return torch.autograd.grad(value, self.params, create_graph=create, materialize_grads=True, allow_unused=True)

    def __call__(self, v: np.ndarray) -> np.ndarray:
        direction = torch.from_numpy(np.array(v)).reshape(-1)
        parts = [
            part.view_as(p)
            for part, p in zip(direction.split([p.numel() for p in self.params]), self.params, strict=True)
        ]
        if self.differences:
            h, sides = 1e-5, []
            for sign in (1, -1):
                with torch.no_grad():
                    saved = [p.clone() for p in self.params]
                    torch._foreach_add_(self.params, parts, alpha=sign * h)
                sides.append(flat(self.gradient()))
                with torch.no_grad():
                    torch._foreach_copy_(self.params, saved)
            return ((sides[0] - sides[1]) / (2 * h)).numpy()
        dot = sum((g * part).sum() for g, part in zip(self.gradient(create=True), parts, strict=True))
        product = torch.autograd.grad(dot, self.params, materialize_grads=True, allow_unused=True)
        return flat(product).numpy()


def _without_hardsigmoid(model: nn.Module) -> nn.Module:
    """The network with a formula in place of what has no second derivative in torch."""

    class Formula(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu6(x + 3) / 6

    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.lower() == "hardsigmoid":
                setattr(module, name, Formula())
    return model


def flat(parts: Any) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in parts])


def error_of(case: Case, name: str) -> tuple[float, str]:
    """(The error of samlite's largest eigenvalue in float64, relative; how it was found)."""
    model, batch, loss = case
    model.double()
    batch = placed(batch, next(model.parameters()))
    found = Hessian(model, loss, [batch]).eigenvalues(1, tol=1e-5, vectors=True, max_matvecs=3000)
    value, vector = float(found.values[0]), found.vectors[:, 0].numpy()
    plain = Plain(model, batch, loss, name in BY_DIFFERENCES)
    p = len(vector)
    if p > LARGE:
        residual = float(np.linalg.norm(plain(vector) - value * vector))
        return min(residual, residual**2) / abs(value) if residual < 1e-3 else residual / abs(value), "residual"
    operator = LinearOperator((p, p), matvec=plain, dtype=np.float64)
    right = float(eigsh(operator, 1, which="LA", tol=1e-8, v0=np.random.default_rng(0).standard_normal(p))[0][0])
    return abs(value - right) / abs(right), "ARPACK"


def moments_of(case: Case) -> str:
    """How samples are taken apart."""
    model, batch, loss = case
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hessian = Hessian(model, loss, [batch])
        v = torch.randn(hessian.shape[0], dtype=hessian.params[0].dtype)
        hessian.moment_operator(2) @ v
    said = [str(warning.message) for warning in caught if "per-sample" in str(warning.message)]
    if not said:
        return "rules"
    return "copies of the weights" if "own copy" in said[0] else "one sample at a time"


class Scalar(nn.Module):
    """The network with its loss, for a library that wants outputs and a criterion."""

    def __init__(self, model: nn.Module, loss: Any) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch).reshape(1, 1)


class Mean(nn.Module):
    reduction = "mean"

    def forward(self, outputs: Tensor, _: Tensor) -> Tensor:
        return outputs.mean()


def times_of(case: Case, repeats: int = 7) -> tuple[float, float]:
    """Seconds of a product, of samlite and of curvlinops (nan where it has none)."""
    model, batch, loss = case
    hessian = Hessian(model, loss, [batch])
    v = torch.randn(hessian.shape[0], dtype=hessian.params[0].dtype)
    ours = seconds(lambda: hessian @ v, repeats)
    try:
        from curvlinops import HessianLinearOperator

        size = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
        whole = Scalar(model.eval(), loss)
        params = [p for p in whole.parameters() if p.requires_grad]
        data = [(batch, torch.zeros(len(size), 1))]
        with sdpa_kernel(SDPBackend.MATH):
            peer = HessianLinearOperator(
                whole, Mean(), params, data, batch_size_fn=lambda b: len(size), check_deterministic=False
            )
            return ours, seconds(lambda: peer @ v, repeats)
    except Exception as error:  # what it does not measure
        print(f"  curvlinops: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
        return ours, float("nan")


def seconds(run: Callable[[], Any], repeats: int) -> float:
    run()
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def row(name: str) -> str:
    """A line of the table."""

    def case() -> Case:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return FAMILIES[name]()

    model, _, _ = case()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ours, peer = times_of(case())
    error, how = error_of(case(), name)
    ratio = f"{ours / peer:.2f}" if peer == peer else "–"
    return f"| {name} | {count:,} | {error:.0e} ({how}) | {moments_of(case())} | {ratio} |"


def main() -> None:
    torch.set_num_threads(2)
    names = sys.argv[1:] or list(FAMILIES)
    head = ["| network | parameters | error of λ_max | moments | time over curvlinops |", "|---|---|---|---|---|"]
    rows = []
    for name in names:
        print(name, file=sys.stderr, flush=True)
        rows.append(row(name))
        print(rows[-1], flush=True)
    if len(sys.argv) > 1:
        return
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text("\n".join([before.rstrip(), "", BEGIN, "", *head, *rows, "", END]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
