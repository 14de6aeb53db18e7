"""Gradients that are written by hand equal those that autograd makes of the plain formula."""
import pytest
import torch
import torch.nn.functional as F
from test_blocks import T, build, tokens
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import chunked_cross_entropy, gated_hidden, rms, short_filter
from model import GPT, GPTConfig
from runtime import compiler, profiling


def agree(fast, plain, *inputs):
    inputs = [x.requires_grad_() for x in inputs]
    a, b = fast(*inputs), plain(*inputs)
    weight = torch.randn_like(b)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for x, y in zip(torch.autograd.grad(a, inputs, weight), torch.autograd.grad(b, inputs, weight)):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_rms_norm():
    torch.manual_seed(0)
    agree(rms, lambda x: F.rms_norm(x, (24,), eps=1e-6), 3 * torch.randn(2, 5, 24))
    agree(rms, lambda x, w: F.rms_norm(x, (24,), w, eps=1e-6), 3 * torch.randn(2, 5, 24), torch.randn(24))
    agree(rms, lambda x: F.rms_norm(x, (24,), eps=1e-6), 1e-3 * torch.randn(2, 5, 24))  # where eps shows


@pytest.mark.parametrize('T', [1, 3, 9])
def test_short_filter(T):
    torch.manual_seed(0)
    agree(short_filter, lambda z, w: sum(w[j] * F.pad(z, (0, 0, j, 0))[:, :T] for j in range(4)), torch.randn(2, T, 6), torch.randn(4, 6))


def test_gated_hidden():
    torch.manual_seed(0)

    def plain(z, gate):
        u = z.relu() ** 2
        return gate * u / (u.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    agree(gated_hidden, plain, torch.randn(20, 12), torch.rand(20, 1))


# ---- the loss

def use_fused_loss(monkeypatch, compile_chunk=lambda chunk_loss: chunk_loss):
    """The path of a GPU on this CPU, in chunks of 128 rows, by default with a body that is not compiled."""
    body = compile_chunk(kernels.chunk_loss)
    monkeypatch.setattr(kernels, 'FUSED_DEVICES', {'cpu'})
    monkeypatch.setattr(kernels, 'CHUNK_BYTES', 0)
    monkeypatch.setattr(kernels, 'compiled_chunk_loss', lambda: body)


@pytest.fixture(params=['eager_loss', 'fused_loss'])
def path(request, monkeypatch):
    if request.param == 'fused_loss':
        use_fused_loss(monkeypatch)
    return request.param


def capped(logits, cap):
    return cap * torch.tanh(logits / cap) if cap else logits


def formula(x, w, targets, softcap=0.0, teacher=None):
    """chunked_cross_entropy of all logits at once."""
    logits = capped(x @ w.T, softcap)
    loss = F.cross_entropy(logits, targets, ignore_index=-1)
    if teacher is None:
        return loss
    x_t, w_t, cap, share = teacher
    q = capped(x_t @ w_t.T, cap).softmax(1)
    distance = F.kl_div(logits.log_softmax(1), q, reduction='none').sum(1)[targets >= 0].mean()
    return (1 - share) * loss + share * distance


def example(V=50, share=None, cap=0.0):
    """300 rows, which are two chunks of 128 and a part -> x, weight, targets, teacher."""
    torch.manual_seed(0)
    teacher = None if share is None else (torch.randn(300, 8), torch.randn(V, 8), cap, share)
    return torch.randn(300, 16), torch.randn(V, 16), torch.randint(-1, V, (300,)), teacher


@pytest.mark.parametrize('V', [50, 64, 131])  # the fused loss pads the vocabulary to 64, 64 and 192
@pytest.mark.parametrize('softcap', [0.0, 2.0])
def test_cross_entropy_with_and_without_a_softcap(path, softcap, V):
    x, w, targets, _ = example(V)
    agree(lambda x, w: chunked_cross_entropy(x, w, targets, softcap), lambda x, w: formula(x, w, targets, softcap), x, w)


@pytest.mark.parametrize('share', [0.3, 1.0])
@pytest.mark.parametrize('softcap, theirs', [(0.0, 0.0), (2.0, 0.0), (0.0, 3.0)])
def test_cross_entropy_with_a_teacher(path, share, softcap, theirs):
    x, w, targets, teacher = example(share=share, cap=theirs)
    agree(lambda x, w: chunked_cross_entropy(x, w, targets, softcap, teacher), lambda x, w: formula(x, w, targets, softcap, teacher), x, w)


@pytest.mark.parametrize('inputs', [torch.float32, 'low'])  # of x, as after an RMSNorm and as after a matrix product
@pytest.mark.parametrize('low', [torch.bfloat16, torch.float16])
def test_cross_entropy_in_low_precision(path, low, inputs):
    x, w, targets, teacher = example(share=0.3, cap=3.0)
    x = x.to(low if inputs == 'low' else inputs)
    expected = formula(a := x.float().requires_grad_(), b := w.clone().requires_grad_(), targets, 5.0, teacher)
    expected.backward()
    x.requires_grad_(), w.requires_grad_()
    with torch.autocast('cpu', low):
        loss = chunked_cross_entropy(x, w, targets, 5.0, teacher)
    loss.backward()
    assert loss.dtype == torch.float32 and x.grad.dtype == x.dtype and w.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    for ours, theirs in ((x.grad, a.grad), (w.grad, b.grad)):
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize('softcap, share', [(0.0, None), (5.0, 0.3)])
@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_the_compiled_body_of_the_fused_loss_is_the_formula(monkeypatch, backend, softcap, share):
    torch._dynamo.reset()
    use_fused_loss(monkeypatch, lambda body: torch.compile(body, backend=backend, dynamic=False, fullgraph=True))
    x, w, targets, teacher = example(share=share, cap=3.0)
    with FlopCounterMode(display=False):  # would keep the body from being compiled for ever
        expected = chunked_cross_entropy(x, w, targets, softcap, teacher)
    with torch.inference_mode():
        torch.testing.assert_close(chunked_cross_entropy(x, w, targets, softcap, teacher), expected)
    agree(lambda x, w: chunked_cross_entropy(x, w, targets, softcap, teacher), lambda x, w: formula(x, w, targets, softcap, teacher), x, w)
    assert kernels.FUSED_DEVICES, 'compilation failed'


def test_the_body_compiles_once_with_and_once_without_gradients_inside_a_compiled_model(monkeypatch):
    compilations, losses = [], []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward
    models, idx = [build('none', n_layer=1, vocab_size=101) for _ in range(2)], tokens(9, T)  # 288 rows: 3 chunks
    for model in models:
        model.activation_checkpointing = True
        if model is models[1]:
            torch._dynamo.reset()
            use_fused_loss(monkeypatch, lambda body: torch.compile(body, backend=backend, dynamic=False, fullgraph=True))
            monkeypatch.setattr(compiler, 'BACKEND', 'aot_eager')
            model = compiler.compiled(model)
        model(idx, idx).backward()
        with torch.no_grad():
            losses.append(model(idx, idx).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    assert kernels.FUSED_DEVICES and len(compilations) == 2


def test_without_a_compiler_the_loss_says_so_once_and_goes_on(monkeypatch, capsys):
    def no_compiler(*_):
        raise RuntimeError('no compiler here\nat all')
    x, w, targets, _ = example()
    expected = chunked_cross_entropy(x, w, targets)
    use_fused_loss(monkeypatch, lambda body: no_compiler)
    assert [chunked_cross_entropy(x, w, targets) for _ in range(2)] == [expected, expected]
    assert capsys.readouterr().err == 'the loss runs without torch.compile, which is slower: RuntimeError: no compiler here\n'


def test_the_fused_loss_passes_on_that_memory_is_out(monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError
    use_fused_loss(monkeypatch, lambda body: out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        chunked_cross_entropy(*example()[:3])
    assert kernels.FUSED_DEVICES == {'cpu'}


def test_a_loss_without_gradients_computes_none(path, monkeypatch):
    x, w, targets, _ = example()
    x.requires_grad_()
    expected, sizes, computed = chunked_cross_entropy(x, w, targets), [], kernels.loss_and_gradients

    def recorded(*arguments):
        result = computed(*arguments)
        sizes.append(result[1].numel())
        return result
    monkeypatch.setattr(kernels, 'loss_and_gradients', recorded)
    with torch.no_grad():
        assert chunked_cross_entropy(x, w, targets) == expected
    chunked_cross_entropy(x, w, targets)
    assert sizes == [0, x.numel()]


def test_a_chunk_of_the_fused_loss_is_at_most_a_gigabyte():
    for V, low, positions, expected in (
            (50_257, torch.bfloat16, 32_768, (8192, 50_304)), (50_304, torch.float32, 32_768, (4096, 50_304)),
            (256, torch.bfloat16, 1 << 20, (8192, 256)), (50_257, torch.bfloat16, 300, (512, 50_304)),
            (300_000, torch.bfloat16, 1, (128, 300_032)), (300_000, torch.bfloat16, 8192, (1024, 300_032))):
        rows, columns = kernels.loss_chunk('cuda', V, low, positions)
        assert (rows, columns) == expected and rows * columns * low.itemsize <= 2 ** 30
    with torch.device('meta'):
        model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, ffn='none', vocab_size=50_257, block_size=1024))
    for device, bytes_of_logits in (('cuda', 8192 * 50_304 * 2), ('cpu', 64 * 50_257 * (4 + 2))):
        assert profiling.logit_bytes(model, 32, torch.device(device), torch.bfloat16) == bytes_of_logits
