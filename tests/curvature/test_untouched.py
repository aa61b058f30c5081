"""A measurement is that of one fixed function, whatever is switched on around it, and leaves the model as it was."""

import copy
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from models import network, samples
from oracles import dense_hessian
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from samlite import Hessian

CE = nn.CrossEntropyLoss()
F = nn.functional


def top(model: nn.Module, loss: Any = CE, data: Any = None, **options: Any) -> Tensor:
    found = Hessian(model, loss, samples() if data is None else data, **options).eigenvalues(2, tol=1e-9)
    assert found.converged and found.complete
    return found.values


def product(model: nn.Module, loss: Any = CE, data: Any = None, **options: Any) -> Tensor:
    """H v of a v that sees every entry of H; faster than eigenvalues."""
    h = Hessian(model, loss, samples() if data is None else data, **options)
    return h @ torch.linspace(-1, 1, h.shape[0], dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-8)  # what is asked of eigenvalues, and a little


# --- Ambient modes


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": lambda: default_dtype(torch.float16),
    "default device": lambda: default_device("meta"),
    "deterministic algorithms": deterministic,
    "anomaly mode": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "cached parametrizations": parametrize.cached,
    "saved tensors on the CPU": torch.autograd.graph.save_on_cpu,
    "saved tensors rounded": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.half() if t.is_floating_point() else t, lambda t: t.double() if t.is_floating_point() else t
    ),
    "one thread for backward": lambda: torch.autograd.set_multithreading_enabled(False),
}


def everything(h: Hessian) -> list[float]:
    moments, stability, sharpness = h.moments(3, tol=1e-6), h.stability(0.1, 0.05), h.sharpness()
    return [
        *h.eigenvalues(2, tol=1e-9).values.tolist(),
        *(h @ torch.linspace(-1, 1, h.shape[0], dtype=torch.float64, device="cpu")).tolist(),
        *h.gradient().tolist(),
        *moments.powers.values(),
        *(stability.value, stability.max_lr, sharpness.ascent, sharpness.ascent_samples),
        *(h.trace(tol=0.3).value, h.frobenius(tol=0.3).value, *h.density(tol=0.5, steps=5).density[::100].tolist()),
        *(block.trace.value for block in h.blocks().values()),
    ]


@pytest.fixture(scope="module")
def outside() -> list[float]:
    return everything(Hessian(network(), CE, samples(), curvature="ggn"))


@pytest.mark.parametrize("mode", MODES)
def test_a_measurement_inside_a_mode_is_the_one_outside(mode: str, outside: list[float]) -> None:
    model, data = network(), samples()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anomaly mode says that it is on
        with MODES[mode]():
            h = Hessian(model, CE, data, curvature="ggn")
            inside = everything(h)
    assert inside == pytest.approx(outside, rel=1e-6, nan_ok=True)
    assert h.eigenvalues(2, tol=1e-9).values.tolist() == pytest.approx(outside[:2])  # the same object outside again


@pytest.mark.parametrize("watch", [lambda: FlopCounterMode(display=False), torch.autograd.profiler.profile])
def test_a_measurement_that_is_watched_is_the_same(watch: Callable[[], AbstractContextManager[Any]]) -> None:
    outside = product(network())
    with watch():
        assert torch.equal(product(network()), outside)


def test_hooks_on_saved_tensors_are_there_again_afterwards() -> None:
    packed: list[Tensor] = []
    model, data = network(), samples()
    x = torch.ones(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        top(model, data=data)
        assert packed == []
        x.square()
    assert len(packed) == 1


def test_data_made_in_inference_mode_are_measured() -> None:
    model = network()
    with torch.inference_mode():
        data = [(samples()[0].clone(), samples()[1].clone())]
        inside = top(model, data=data)
    assert close(inside, top(model)) and close(top(model, data=data), inside)


def test_cached_parametrizations_are_measured_anew() -> None:
    model = network()
    parametrizations.orthogonal(model[2])
    with parametrize.cached():
        with torch.no_grad():
            model(samples()[0])  # whose weights are kept without a graph
        inside = top(model)
    assert close(inside, top(model))


def test_an_autocast_inside_of_the_model_sees_the_weights_of_the_moment() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network().float()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x.float()).float()

    model, (x, y) = Mixed(), samples()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # whose cache would hold weights without a graph
        model(x)
        values = Hessian(model, CE, (x.float(), y)).eigenvalues(1).values
    plain = Hessian(model.inner, CE, (x.float(), y)).eigenvalues(1).values
    assert torch.allclose(values, plain, rtol=0.05)  # bfloat16 has 8 bits


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: torch.func.vmap(lambda x: f(x))])
def test_transforms_of_functions_are_refused_by_name(transform: Callable[..., Any]) -> None:
    model, data = network(), samples()

    def inside(x: Tensor) -> Tensor:
        Hessian(model, CE, data)
        return x.sum()

    with pytest.raises(ValueError, match=r"inside a transform of torch\.func"):
        transform(inside)(torch.ones(3))


def test_fake_tensors_are_refused_by_name() -> None:
    from torch._subclasses import FakeTensorMode

    model, data = network(), samples()
    with FakeTensorMode(), pytest.raises(ValueError, match="FakeTensorMode"):
        Hessian(model, CE, data)


NEWER_SWITCHES = pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has none of them")


@NEWER_SWITCHES
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_precision_of_products_is_switched_off_and_on_again(precision: str) -> None:
    seen = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append((torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision))
        with torch.backends.cudnn.flags(enabled=False):  # which reads the older switches
            return CE(model(batch[0]), batch[1])

    torch.set_float32_matmul_precision(precision)
    before = precisions()
    try:
        top(network(), loss)
        assert set(seen) <= {("ieee", "ieee"), ("ieee", "none")} and precisions() == before  # none: as by default
    finally:
        torch.set_float32_matmul_precision("highest")


def precisions() -> list[Any]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    old = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    return [*old, *(part.fp32_precision for part in (matmul, cudnn.conv, cudnn.rnn, torch.backends.mkldnn.matmul))]


@NEWER_SWITCHES
def test_switches_that_contradict_each_other_are_left_so() -> None:
    cudnn: Any = torch.backends.cudnn
    cudnn.conv.fp32_precision = "ieee"  # while the older switch allows TF32
    try:
        assert close(top(network()), top(network()))
        assert cudnn.conv.fp32_precision == "ieee" and cudnn.rnn.fp32_precision == "tf32"
        with pytest.raises(RuntimeError, match="TF32"):
            _ = cudnn.allow_tf32
    finally:
        cudnn.conv.fp32_precision = "tf32"


def test_a_model_that_hides_its_graph_is_not_flat() -> None:
    class Hidden(nn.Module):
        def __init__(self, hide: Any) -> None:
            super().__init__()
            self.inner, self.hide = network(), hide

        def forward(self, x: Tensor) -> Tensor:
            with self.hide():
                return self.inner(x)

    for hide in (torch.no_grad, torch.inference_mode):
        with pytest.raises(ValueError, match="got one without a graph"):
            Hessian(Hidden(hide), CE, samples())
    with pytest.raises(ValueError, match="got one without a graph"):
        Hessian(network(), lambda m, b: (m(b[0]).argmax(1) != b[1]).double().mean(), samples())


def test_a_loss_that_differentiates_inside_is_measured() -> None:
    model = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    t = torch.linspace(0, 1, 15, dtype=torch.float64)[:, None]

    def residual(f: Callable[[Tensor], Tensor]) -> Tensor:
        inputs = t.clone().requires_grad_()
        u = f(inputs)
        (slope,) = torch.autograd.grad(u.sum(), inputs, create_graph=True)
        return (slope + u).square().mean()

    found = top(model, lambda m, b: residual(m), [(t, t)])
    assert close(found, torch.linalg.eigvalsh(dense_hessian(model, residual)).flip(0)[:2])


# --- Hooks


def scaled(gradient: Tensor) -> Tensor:
    return 10 * gradient


def on_output(hook: Callable[[Tensor], Any]) -> Callable[[nn.Module], Any]:
    """Registers, in the forward pass of the first layer, a hook on what it returns."""
    return lambda model: model[0].register_forward_hook(lambda module, inputs, output: hook(output) and None)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "on a weight": lambda m: m[0].weight.register_hook(scaled),
    "a clamp on a weight": lambda m: m[2].bias.register_hook(lambda g: g.clamp(-0.01, 0.01)),
    "after accumulation": lambda m: m[0].weight.register_post_accumulate_grad_hook(lambda p: p.grad.zero_()),
    "on several weights": lambda m: torch.autograd.graph.register_multi_grad_hook([*m.parameters()], lambda g: 1 / 0),
    "of a module": lambda m: m[2].register_full_backward_hook(lambda m, i, o: (10 * i[0],)),
    "before a module": lambda m: m[2].register_full_backward_pre_hook(lambda m, o: (10 * o[0],)),
    "on an output": on_output(lambda z: z.register_hook(scaled)),
    "on a node": on_output(lambda z: z.grad_fn.register_prehook(lambda g: (10 * g[0],))),
    "behind a node": on_output(
        lambda z: z.grad_fn.register_hook(lambda i, o: tuple(10 * g for g in i if g is not None))
    ),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_hooks_on_gradients_have_no_part_in_the_loss(kind: str, curvature: Any) -> None:
    model, plain = network(), network()
    handle = HOOKS[kind](model)
    before = [dict(p._backward_hooks or {}) for p in model.parameters()]
    for memory in ("1GB", 0):  # graphs that are kept, and graphs that are built anew
        h, reference = (Hessian(m, CE, samples(), curvature=curvature, memory=memory) for m in (model, plain))
        v = torch.linspace(-1, 1, h.shape[0], dtype=torch.float64)
        assert torch.allclose(h @ v, reference @ v, rtol=1e-9)
        assert torch.allclose(h.moment_operator(2) @ v, reference.moment_operator(2) @ v, rtol=1e-9)
        assert torch.allclose(h.gradient(), reference.gradient())
    assert [dict(p._backward_hooks or {}) for p in model.parameters()] == before
    handle.remove()


def test_hooks_work_on_in_training_while_and_after_their_model_is_measured() -> None:
    model, (x, y), seen = network(), samples(), []
    model[0].weight.register_hook(lambda g: seen.append("weight"))
    model[2].register_full_backward_hook(lambda *_: seen.append("module"))
    loss = CE(model(x), y)  # a step is under way
    top(model)
    assert seen == []
    loss.backward()
    assert sorted(seen) == ["module", "weight"]


def test_a_hook_that_a_forward_pass_registers_on_a_weight_is_gone_afterwards() -> None:
    model = network()
    model[0].register_forward_hook(
        lambda m, i, o: m.weight.register_hook(scaled) and None if m.weight.requires_grad else None
    )
    assert close(top(model), top(network()))
    assert not model[0].weight._backward_hooks


def test_a_global_hook_of_modules_has_no_part_in_the_loss() -> None:
    handle = nn.modules.module.register_module_full_backward_hook(lambda m, i, o: tuple(10 * g for g in i))
    try:
        inside = top(network())
    finally:
        handle.remove()
    assert close(inside, top(network()))


# --- What a forward pass writes


class Writer(nn.Module):
    """Writes into everything that it has but its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        self.register_buffer("count", torch.zeros(()))
        self.plain, self.seen, self.last = torch.zeros(2), [], {"x": torch.zeros(3)}
        self.calls, self.output = 0, None
        self.shared = self.last  # the same dictionary under two names

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.plain.add_(1)
        self.seen.append(x)
        self.last["x"].add_(1)
        self.shared["y"] = x
        assert "y" in self.last
        self.calls += 1
        self.output = self.layer(x)
        return self.output


def test_whatever_a_forward_pass_writes_is_as_it_was() -> None:
    model = Writer()
    h = Hessian(model, CE, samples())
    h.eigenvalues(1)
    h.moments(2)
    assert model.count == 0 and model.plain.tolist() == [0, 0] and model.seen == [] and model.calls == 0
    assert model.output is None and list(model.last) == ["x"] and model.last["x"].tolist() == [0, 0, 0]
    assert model.shared is model.last
    assert close(top(model), top(model.layer))


def test_a_loss_and_a_teacher_are_left_as_they_were_too() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()  # in train mode

    class Distillation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.calls = teacher, 0

        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            return F.cross_entropy(out, y)

    def closure(model: nn.Module, batch: Any, other: nn.Module | None = None) -> Tensor:
        (other or teacher)(batch[0])
        return CE(model(batch[0]), batch[1])

    module, state = Distillation(), copy.deepcopy(teacher.state_dict())
    for loss in (module, closure, partial(closure, other=teacher), lambda m, b: closure(m, b, teacher)):
        assert close(top(network(), loss), top(network()))
        assert module.calls == 0 and teacher.training
        assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())


def test_data_that_a_model_writes_into_are_left_as_they_were() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.mul_(2))

    model, (x, y) = InPlace(), samples()
    before = x.clone()
    for data in ((x, y), [(x[:7], y[:7]), (x[7:], y[7:])]):
        assert torch.allclose(product(model, data=data, memory=0), product(model.inner, data=(2 * before, y)))
        assert torch.equal(x, before)


WEIGHT_NORMS = {
    parametrizations.weight_norm: ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    torch.nn.utils.weight_norm: ("weight_g", "weight_v"),
}


@pytest.mark.parametrize("normalize", WEIGHT_NORMS, ids=["parametrized", "hook"])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:no per-sample rule")
def test_weight_norm_is_measured_as_its_formula(normalize: Any) -> None:
    """torch computes it in one operation, whose second derivative is wrong."""

    class Written(nn.Module):
        def __init__(self, *weights: Tensor) -> None:
            super().__init__()
            self.bias, self.g, self.v = (nn.Parameter(weight.detach().clone()) for weight in weights)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.g * self.v / self.v.norm(dim=1, keepdim=True), self.bias)

    fused = torch._weight_norm
    layer = normalize(nn.Linear(4, 3).double())
    written = Written(*(layer.get_parameter(name) for name in ("bias", *WEIGHT_NORMS[normalize])))
    assert close(top(layer), top(written))
    found, right = (Hessian(model, CE, samples()).moments(3).nonuniformity for model in (layer, written))
    assert found == pytest.approx(right, rel=1e-6)
    assert torch._weight_norm is fused


def embedded(max_norm: float | None = None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4, max_norm=max_norm, **options), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}], ids=str)
def test_an_embedding_that_changes_its_gradient_is_measured_as_one_that_does_not(options: dict[str, bool]) -> None:
    data = torch.arange(21) % 7, torch.arange(21) % 3
    model, plain = embedded(**options), embedded()
    assert close(top(model, data=data), top(plain, data=data))
    h, reference = Hessian(model, CE, data), Hessian(plain, CE, data)
    assert torch.allclose(h.gradient(), reference.gradient())
    assert h.moments(2).nonuniformity == reference.moments(2).nonuniformity
    assert all(getattr(model[0], name) for name in options)


@pytest.mark.parametrize("memory", ["1GB", 0])
def test_an_embedding_with_a_norm_limit_is_measured_where_a_pass_would_bring_it(memory: Any) -> None:
    model, plain, tokens = embedded(1.0), embedded(None), torch.arange(21) % 7
    y = torch.arange(21) % 3
    before = model[0].weight.detach().clone()
    data = [(tokens[:11], y[:11]), (tokens[11:], y[11:])]
    with torch.no_grad():
        plain[0].weight.renorm_(2, 0, 1.0)
    assert not torch.equal(plain[0].weight, before)
    assert torch.allclose(top(model, data=data, memory=memory), top(plain, data=data), rtol=1e-6)  # torch adds 1e-7
    assert Hessian(model, CE, data).moments(2).fallback is None
    assert torch.equal(model[0].weight, before) and model[0].max_norm == 1.0


def test_an_embedding_with_a_norm_limit_that_other_layers_see_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Embedding(7, 4, max_norm=1.0).double()

        def forward(self, i: Tensor) -> Tensor:
            return F.linear(self.e(i).tanh(), self.e.weight)

    model, data = Tied(), (torch.arange(7), torch.arange(7))
    before = model.e.weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"rows of e\.weight must not be longer than max_norm=1\.0 where linear uses it"
    ):
        Hessian(model, CE, data)
    assert torch.equal(model.e.weight, before)
    with torch.no_grad():
        model.e.weight.renorm_(2, 0, 0.9)
    assert top(model, data=data).isfinite().all()


@pytest.mark.parametrize("through_data", [False, True])
def test_a_forward_pass_that_writes_into_weights_is_refused_and_they_are_put_back(through_data: bool) -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                (self.layer.weight.data if through_data else self.layer.weight).clamp_(-0.1, 0.1)
            return self.layer(x)

    model = Clipped()
    before = model.layer.weight.detach().clone()
    with pytest.raises(ValueError, match="forward pass must leave the parameters as they are"):
        Hessian(model, CE, samples())
    assert torch.equal(model.layer.weight, before)


# --- Networks that torch runs in another way


class Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module, reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.b, self.layer, self.reentrant = nn.Linear(4, 6), nn.Linear(6, 3), layer, reentrant
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = self.layer(h) if self.reentrant is None else checkpoint(self.layer, h, use_reentrant=self.reentrant)
        return self.b(h)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Tanh()], ids=["dropout", "norm", "tanh"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_network_is_measured_as_the_plain_one(layer: nn.Module, reentrant: bool) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 6), layer)
    plain, model = Checkpointed(block, None).train(), Checkpointed(block, reentrant).train()
    model.load_state_dict(plain.state_dict())
    buffers = [b.clone() for b in model.buffers()]
    for options in ({}, {"params": "a.*"}, {"memory": 0}, {"curvature": "ggn"}):
        assert torch.allclose(product(model, **options), product(plain, **options), rtol=1e-10)
    powers = (Hessian(m, CE, samples()).moments(2).powers[2] for m in (model, plain))
    assert next(powers) == pytest.approx(next(powers), rel=1e-6)
    assert all(map(torch.equal, buffers, model.buffers()))
    model(samples()[0]).sum().backward()  # and it checkpoints again


def test_checkpointing_is_back_when_several_threads_have_measured() -> None:
    import torch.utils.checkpoint as module

    before = module.CheckpointFunction, module._checkpoint_without_reentrant_generator
    threads = [threading.Thread(target=top, args=(network(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (module.CheckpointFunction, module._checkpoint_without_reentrant_generator) == before


def test_a_compiled_module_inside_is_measured_uncompiled() -> None:
    plain = network()
    compiled_inside, compiled_in_place = copy.deepcopy(plain), copy.deepcopy(plain)
    compiled_inside[0] = torch.compile(compiled_inside[0], backend="eager")
    compiled_in_place.compile(backend="eager")
    for model in (compiled_inside, compiled_in_place, torch.compile(plain, backend="eager")):
        model(samples()[0])
        assert close(top(model), top(plain))
        moments = Hessian(model, CE, samples()).moments(2)
        assert moments.fallback is None and moments.converged


def test_an_encoder_with_a_padding_mask_is_measured_layer_by_layer() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.zeros(x.shape[:2], dtype=torch.bool)
            mask[:, -1] = True
            return self.head(self.encoder(x, src_key_padding_mask=mask)[:, 0])

    torch.manual_seed(0)
    model = Encoder().double().eval()
    x, y = torch.randn(6, 3, 4, dtype=torch.float64), torch.arange(6) % 3
    for name in ("head.*", "encoder.layers.0.*"):
        chosen = [n for n, _ in model.named_parameters() if n.startswith(name[:-1])]
        truth = torch.linalg.eigvalsh(dense_hessian(model, lambda f: CE(f(x), y), chosen)).flip(0)[:2]
        assert close(top(model, data=(x, y), params=name), truth)


# --- Operations of somebody's own


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * s * (1 + x * (1 - s))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


class Raising(Once):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise KeyError("its own message")


class Activated(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.activation = network(), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.inner(x))


@pytest.mark.parametrize("profiled", [False, True])
def test_an_autograd_function_of_somebodys_own_is_measured_as_what_it_computes(profiled: bool) -> None:
    own, plain = Activated(Swish.apply), Activated(F.silu)
    with torch.profiler.profile() if profiled else nullcontext():
        for _ in range(5):
            assert close(top(own), top(plain))
        h, reference = (Hessian(model, CE, samples()) for model in (own, plain))
        moments, same = h.moments(3), reference.moments(3)
        assert moments.fallback is None and moments.nonuniformity == pytest.approx(same.nonuniformity, rel=1e-6)
        assert h.trace(tol=0.3).value == pytest.approx(reference.trace(tol=0.3).value)
        assert h._operator.kept == reference._operator.kept == 1


def test_an_autograd_function_without_a_second_derivative_is_named() -> None:
    for curvature in ("hessian", "ggn"):  # autograd itself takes it for a constant
        h = Hessian(Activated(Once.apply), CE, samples(), curvature=curvature)
        for measure in (lambda h=h: h.eigenvalues(1), lambda h=h: h.moments(2), lambda h=h: h.stability(0.1)):
            with pytest.raises(ValueError, match=r"twice differentiable, got an operation behind inner\.0\.weight"):
                measure()
    with pytest.raises(KeyError, match="its own message"):
        Hessian(Activated(Raising.apply), CE, samples()).eigenvalues(1)


def test_a_quantised_layer_does_not_read_as_flat() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their age
        quantised = torch.ao.quantization.quantize_dynamic(network().float(), {nn.Linear})
        model = nn.Sequential(nn.Linear(4, 4), quantised, nn.Linear(3, 3))
        with pytest.raises(ValueError, match="an operation without a derivative, as quantised layers are"):
            Hessian(model, CE, (samples()[0].float(), samples()[1]))


@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda m: torch.jit.trace(m, samples()[0])], ids=["script", "trace"]
)
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_network_is_measured_as_the_plain_one(make: Any) -> None:
    plain = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    plain(samples()[0])
    model = make(plain.eval())
    buffers = [b.clone() for b in model.buffers()]
    assert close(top(model), top(plain))
    assert all(map(torch.equal, buffers, model.buffers()))


# --- Parameters without values


def test_parameters_without_values_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="got 0.weight not initialised yet; run the model once"):
        Hessian(nn.Sequential(nn.LazyLinear(3)), CE, samples())
    with pytest.raises(ValueError, match="got weight on the meta device; load the weights first"):
        Hessian(nn.Linear(4, 3, device="meta"), CE, samples())
    with torch.inference_mode():
        made = nn.Linear(4, 3).double()
    with pytest.raises(ValueError, match="got weight made in inference mode"):
        Hessian(made, CE, samples())


class Rows(torch.utils.data.Dataset[Any]):
    """Samples whose loading draws random numbers of every kind."""

    def __init__(self) -> None:
        self.x, self.y = samples()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002
        return self.x[i], self.y[i]


def test_random_states_are_kept_whatever_a_loader_draws() -> None:
    def states() -> list[Any]:
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # noqa: NPY002

    model, loader = network(), torch.utils.data.DataLoader(Rows(), 8)
    before = states()
    for memory in ("1GB", 0):
        assert close(top(model, data=loader, memory=memory), top(model))
    assert states() == before


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("memory", ["1GB", 0])
def test_a_loader_that_shuffles_is_refused_whether_graphs_are_kept_or_not(drop_last: bool, memory: Any) -> None:
    loader = torch.utils.data.DataLoader(Rows(), 8, shuffle=True, drop_last=drop_last)
    for measure in (lambda h: h.eigenvalues(1), lambda h: h.moments(2), lambda h: h.gradient(), lambda h: h.trace()):
        with pytest.raises(ValueError, match="same batches and losses at every pass"):
            measure(Hessian(network(), CE, loader, memory=memory))
