"""Losses against the authors' figures, numbers by hand, and a written-out slow form."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shike_core.losses import (
    balanced_softmax,
    consistency,
    dynamic_knowledge_transfer,
    mutual_distillation,
    stage1_loss,
    summed_cross_entropy,
)

SHAPES = [(1, 1, 2), (3, 1, 10), (2, 2, 2), (4, 2, 10), (3, 5, 2), (2, 5, 10), (2, 2, 365)]
SHAPES += [(2, 5, 365)]  # (batch, experts, classes)
REDUCTIONS = ["mean", "batchmean"]
TEACHER_TARGETS = ["zero", "masked"]


def problem(shape: tuple[int, int, int], seed: int = 0, spread: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    targets = torch.randint(shape[2], (shape[0],), generator=generator)
    counts = torch.randint(1, 500, (shape[2],), generator=generator)
    return logits.requires_grad_(), targets, counts


problems = st.builds(
    lambda batch, experts, classes, seed: problem((batch, experts, classes), seed),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(2, 12),
    st.integers(0, 10**6),
)


# The method's equations as loops over images and experts, in float64.


def slow_softmax(z: Tensor) -> Tensor:
    return z.exp() / z.exp().sum()


def slow_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def slow_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    total = logits.new_zeros(())
    for z, y in zip(logits, targets.tolist(), strict=True):
        for expert in z:
            total = total - slow_softmax(expert)[y].log()
    return total / len(logits)


def slow_balanced_softmax(logits: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    total = logits.new_zeros(())
    for z, y in zip(logits, targets.tolist(), strict=True):
        for expert in z:
            weighted = counts * expert.exp()
            total = total - (weighted[y] / weighted.sum()).log()
    return total / len(logits)


def slow_smoothed(logits: Tensor, targets: Tensor, counts: Tensor, smoothing: float) -> Tensor:
    classes = logits.shape[2]
    total = logits.new_zeros(())
    for z, y in zip(logits, targets.tolist(), strict=True):
        for expert in z:
            weighted = counts * expert.exp()
            for label in range(classes):
                share = smoothing / classes + (1 - smoothing) * (label == y)
                total = total - share * (weighted[label] / weighted.sum()).log()
    return total / len(logits)


def slow_transfer(
    logits: Tensor, targets: Tensor, reduction: str, detach: bool, teacher_target: str
) -> Tensor:
    batch, experts, classes = logits.shape
    total = logits.new_zeros(())
    for z, y in zip(logits, targets.tolist(), strict=True):
        negatives = [j for j in range(classes) if j != y]
        mean = sum(z[m] for m in range(experts)) / experts
        hardest = max(negatives, key=lambda j: mean[j].item())
        teacher = {
            j: mean[j] if j == hardest else max((z[m, j] for m in range(experts)), key=Tensor.item)
            for j in negatives
        }
        if teacher_target == "zero":
            teacher[y] = logits.new_zeros(())
        p = slow_softmax(torch.stack(list(teacher.values())))
        for m in range(experts):
            masked = torch.stack(
                [logits.new_tensor(-30.0) if j == y else z[m, j] for j in range(classes)]
            )
            q = slow_softmax(masked)[list(teacher)]
            total = total + slow_kl(p.detach() if detach else p, q)
    return total / (batch * classes if reduction == "mean" else batch)


def slow_mutual(
    logits: Tensor,
    reduction: str,
    detach: bool,
    temperature: float,
    targets: Tensor | None = None,
) -> Tensor:
    batch, experts, classes = logits.shape
    total = logits.new_zeros(())
    for index, z in enumerate(logits):
        for i in range(experts):
            for j in range(experts):
                teaches = targets is None or z[j].argmax() == targets[index]
                if i != j and teaches:
                    p, q = slow_softmax(z[j] / temperature), slow_softmax(z[i] / temperature)
                    total = total + slow_kl(p.detach() if detach else p, q)
    return temperature**2 * total / (batch * classes if reduction == "mean" else batch)


def assert_same_value_and_gradient(fast: Tensor, slow: Tensor, logits: Tensor) -> None:
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
    gradients = [
        torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)[0]
        if loss.requires_grad
        else None
        for loss in (fast, slow)
    ]
    fast_gradient, slow_gradient = (torch.zeros_like(logits) if g is None else g for g in gradients)
    torch.testing.assert_close(fast_gradient, slow_gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropies_against_the_slow_form(shape) -> None:
    logits, targets, counts = problem(shape)
    assert_same_value_and_gradient(
        summed_cross_entropy(logits, targets), slow_cross_entropy(logits, targets), logits
    )
    assert_same_value_and_gradient(
        balanced_softmax(logits, targets, counts),
        slow_balanced_softmax(logits, targets, counts),
        logits,
    )


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.25])
@pytest.mark.parametrize("shape", SHAPES)
def test_logit_adjustment_against_the_slow_form(shape, factor) -> None:
    logits, targets, counts = problem(shape)
    assert_same_value_and_gradient(
        balanced_softmax(logits, targets, counts, logit_adjustment=factor),
        slow_balanced_softmax(logits, targets, counts.double() ** factor),
        logits,
    )


@pytest.mark.parametrize("smoothing", [0.1, 0.9])
@pytest.mark.parametrize("shape", SHAPES[:-2])
def test_label_smoothing_against_the_slow_form(shape, smoothing) -> None:
    logits, targets, counts = problem(shape)
    assert_same_value_and_gradient(
        balanced_softmax(logits, targets, counts, label_smoothing=smoothing),
        slow_smoothed(logits, targets, counts, smoothing),
        logits,
    )
    assert_same_value_and_gradient(
        summed_cross_entropy(logits, targets, label_smoothing=smoothing),
        slow_smoothed(logits, targets, torch.ones_like(counts), smoothing),
        logits,
    )


@pytest.mark.parametrize("teacher_target", TEACHER_TARGETS)
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_knowledge_transfer_against_the_slow_form(shape, reduction, detach, teacher_target) -> None:
    logits, targets, _ = problem(shape)
    fast = dynamic_knowledge_transfer(
        logits,
        targets,
        kl_reduction=reduction,
        detach_teachers=detach,
        teacher_target=teacher_target,
    )
    slow = slow_transfer(logits, targets, reduction, detach, teacher_target)
    assert_same_value_and_gradient(fast, slow, logits)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_mutual_distillation_against_the_slow_form(shape, reduction, detach, temperature) -> None:
    logits, _, _ = problem(shape)
    fast = mutual_distillation(
        logits, kl_reduction=reduction, detach_teachers=detach, temperature=temperature
    )
    assert_same_value_and_gradient(
        fast, slow_mutual(logits, reduction, detach, temperature), logits
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_only_experts_that_are_right_teach(shape, reduction, detach, temperature) -> None:
    logits, targets, _ = problem(shape)
    halfway = len(targets) // 2  # the first expert is right about these, whatever was drawn
    with torch.no_grad():
        logits[:halfway, 0].scatter_(1, targets[:halfway, None], 9.0)
    options = {"kl_reduction": reduction, "detach_teachers": detach, "temperature": temperature}
    fast = mutual_distillation(logits, targets, **options)
    slow = slow_mutual(logits, reduction, detach, temperature, targets)
    assert_same_value_and_gradient(fast, slow, logits)
    terms = stage1_loss(logits, targets, mutual_teachers="correct", **options)
    torch.testing.assert_close(terms.mutual_distillation, fast)


def test_an_expert_that_is_wrong_teaches_nothing() -> None:
    right, wrong = torch.tensor([5.0, 1.0, 0.0]), torch.tensor([0.0, 5.0, 1.0])
    logits = torch.stack([right, wrong])[None].requires_grad_()
    options = {"kl_reduction": "batchmean", "detach_teachers": True}
    loss = mutual_distillation(logits, torch.tensor([0]), **options)
    torch.testing.assert_close(loss, slow_kl(right.softmax(0), wrong.softmax(0)))
    to_right, to_wrong = torch.autograd.grad(loss, logits)[0][0]
    torch.testing.assert_close(to_right, torch.zeros(3))
    torch.testing.assert_close(to_wrong, wrong.softmax(0) - right.softmax(0))
    assert mutual_distillation(logits, torch.tensor([2]), **options) == 0


@pytest.mark.parametrize("shape", [(3, 1, 10), (4, 3, 10), (2, 5, 2)])
def test_stage1_loss_against_the_slow_form(shape) -> None:
    logits, targets, _ = problem(shape)
    terms = stage1_loss(
        logits,
        targets,
        dkt_weight=0.7,
        mutual_weight=0.3,
        temperature=2.0,
        kl_reduction="batchmean",
        detach_teachers=True,
        teacher_target="masked",
    )
    transfer = 0.7 * slow_transfer(logits, targets, "batchmean", True, "masked")
    mutual = 0.3 * slow_mutual(logits, "batchmean", True, 2.0)
    assert_same_value_and_gradient(terms.dynamic_knowledge_transfer, transfer, logits)
    assert_same_value_and_gradient(terms.mutual_distillation, mutual, logits)
    total = slow_cross_entropy(logits, targets) + transfer + mutual
    assert_same_value_and_gradient(terms.total, total, logits)


@pytest.mark.parametrize("shape", [(3, 1, 10), (4, 3, 10)])
def test_stage1_loss_with_balanced_softmax_against_the_slow_form(shape) -> None:
    logits, targets, counts = problem(shape)
    terms = stage1_loss(logits, targets, objective="balanced_softmax", class_counts=counts)
    balanced = slow_balanced_softmax(logits, targets, counts)
    assert_same_value_and_gradient(terms.cross_entropy, balanced, logits)
    others = 10 * slow_transfer(logits, targets, "mean", False, "zero")
    others = others + slow_mutual(logits, "mean", False, 1.0)
    assert_same_value_and_gradient(terms.total, balanced + others, logits)


# The authors' figures.


@pytest.fixture
def authors(reference):
    """The authors' logits, batch first and ready for gradients, and their targets and counts."""
    logits = torch.from_numpy(reference["loss.logits"]).transpose(0, 1).clone().requires_grad_()
    return logits, *(torch.from_numpy(reference[f"loss.{x}"]) for x in ("targets", "class_counts"))


def assert_gradient(loss: Tensor, logits: Tensor, theirs: np.ndarray) -> None:
    (ours,) = torch.autograd.grad(loss, logits)
    np.testing.assert_allclose(
        ours.transpose(0, 1).numpy(), theirs, rtol=1e-5, atol=1e-6 * np.abs(theirs).max()
    )


def test_stage1_loss_is_that_of_the_authors(reference, authors) -> None:
    logits, targets, _ = authors
    terms = stage1_loss(logits, targets)
    for name, factor in (
        ("cross_entropy", 1),
        ("dynamic_knowledge_transfer", 10),
        ("mutual_distillation", 1),
    ):
        expected = factor * reference[f"loss.{name}"]
        assert getattr(terms, name).item() == pytest.approx(expected, rel=1e-5)
    assert terms.total.item() == pytest.approx(reference["loss.stage1_total"], rel=1e-5)
    assert_gradient(terms.total, logits, reference["grad.stage1_total"])


def test_balanced_softmax_is_that_of_the_authors(reference, authors) -> None:
    logits, targets, counts = authors
    loss = balanced_softmax(logits, targets, counts)
    assert loss.item() == pytest.approx(reference["loss.balanced_softmax"], rel=1e-5)
    assert_gradient(loss, logits, reference["grad.balanced_softmax"])


# Numbers by hand.


def test_summed_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0]], [[0.0, 0.0], [0.0, math.log(3)]]])
    expected = math.log(2) + math.log(4 / 3)  # both images alike: 1/2, then 3/4 on the target
    assert summed_cross_entropy(logits, torch.tensor([0, 1])).item() == pytest.approx(expected)


def test_balanced_softmax_by_hand() -> None:
    logits = torch.zeros(1, 1, 3)
    loss = balanced_softmax(logits, torch.tensor([2]), torch.tensor([70, 25, 5]))
    assert loss.item() == pytest.approx(-math.log(5 / 100))


def test_logit_adjustment_by_hand() -> None:
    logits = torch.zeros(1, 1, 2)
    counts = torch.tensor([4, 1])  # squared 16 and 1
    loss = balanced_softmax(logits, torch.tensor([0]), counts, logit_adjustment=2.0)
    assert loss.item() == pytest.approx(-math.log(16 / 17))


def test_label_smoothing_by_hand() -> None:
    logits = torch.zeros(1, 1, 2)
    counts = torch.tensor([3, 1])  # probabilities 3/4 and 1/4 for targets 0.1 and 0.9
    loss = balanced_softmax(logits, torch.tensor([1]), counts, label_smoothing=0.2)
    assert loss.item() == pytest.approx(-0.1 * math.log(3 / 4) - 0.9 * math.log(1 / 4))


def test_mutual_distillation_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0], [0.0, math.log(3)]]])  # (1/2, 1/2) and (1/4, 3/4)
    one_way = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    other_way = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    loss = mutual_distillation(logits, kl_reduction="batchmean")
    assert loss.item() == pytest.approx(one_way + other_way)


def test_knowledge_transfer_by_hand() -> None:
    ln = math.log
    logits = torch.tensor([[[9.0, ln(9), 0.0], [9.0, 0.0, ln(2)]]])  # target 0
    # Means ln 3 and ln(2) / 2: class 1 is the hardest and keeps its mean; class 2 its maximum.
    teacher = (3 / 5, 2 / 5)
    students = (9 / 10, 1 / 10), (1 / 3, 2 / 3)
    expected = sum(p * ln(p / q) for s in students for p, q in zip(teacher, s, strict=True))
    loss = dynamic_knowledge_transfer(
        logits, torch.tensor([0]), kl_reduction="batchmean", teacher_target="masked"
    )
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_knowledge_transfer_by_hand_leaks_onto_the_target() -> None:
    logits = torch.tensor([[[5.0, math.log(2), 0.0]]])  # target 0, at 0 for the teacher
    teacher = (1 / 4, 1 / 2, 1 / 4)
    student = (math.exp(-30) / 3, 2 / 3, 1 / 3)
    expected = sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True))
    loss = dynamic_knowledge_transfer(logits, torch.tensor([0]), kl_reduction="batchmean")
    assert loss.item() == pytest.approx(expected, rel=1e-6)


# Properties.


@settings(max_examples=30)
@given(problems)
def test_balanced_softmax_with_equal_counts_is_cross_entropy(drawn) -> None:
    logits, targets, counts = drawn
    balanced = balanced_softmax(logits, targets, torch.full_like(counts, 7))
    torch.testing.assert_close(balanced, summed_cross_entropy(logits, targets))


@settings(max_examples=30)
@given(problems)
def test_stage1_with_balanced_softmax_of_equal_counts_is_stage1(drawn) -> None:
    logits, targets, counts = drawn
    equal = torch.full_like(counts, 7)
    plain = stage1_loss(logits, targets)
    balanced = stage1_loss(logits, targets, objective="balanced_softmax", class_counts=equal)
    for ours, expected in zip(balanced, plain, strict=True):
        torch.testing.assert_close(ours, expected)


def test_stage1_with_balanced_softmax_needs_the_counts() -> None:
    logits, targets, counts = problem((3, 2, 4))
    with pytest.raises(ValueError, match="balanced_softmax needs class_counts, got None; give"):
        stage1_loss(logits, targets, objective="balanced_softmax")
    assert stage1_loss(logits, targets, class_counts=counts) == stage1_loss(logits, targets)


@pytest.mark.parametrize("name", ["dkt", "mutual"])
def test_a_term_of_weight_0_is_left_out(name) -> None:
    logits, targets, _ = problem((4, 3, 10))
    weights = {"dkt_weight": 2.0, "mutual_weight": 3.0, f"{name}_weight": 0.0}
    terms = stage1_loss(logits, targets, **weights)
    distillation = [terms.dynamic_knowledge_transfer, terms.mutual_distillation]
    gone, kept = distillation if name == "dkt" else reversed(distillation)
    assert (gone.item(), gone.dtype, gone.device) == (0, logits.dtype, logits.device)
    assert gone.grad_fn is None  # nothing was computed
    assert kept.item() > 0
    torch.testing.assert_close(terms.total, terms.cross_entropy + kept)


@settings(max_examples=30)
@given(problems, st.sampled_from(REDUCTIONS), st.floats(0.1, 10))
def test_mutual_distillation_of_equal_experts_is_zero(drawn, reduction, temperature) -> None:
    logits = drawn[0][:, :1].expand_as(drawn[0])
    loss = mutual_distillation(logits, kl_reduction=reduction, temperature=temperature)
    assert abs(loss.item()) < 1e-12


@settings(max_examples=30)
@given(problems)
def test_distillation_terms_are_never_negative(drawn) -> None:
    terms = stage1_loss(drawn[0], drawn[1])
    assert min(term.item() for term in terms) >= -1e-12


@settings(max_examples=30)
@given(problems, st.sampled_from(TEACHER_TARGETS), st.booleans(), st.randoms())
def test_the_order_of_experts_changes_nothing(drawn, teacher_target, detach, random) -> None:
    logits, targets, counts = drawn
    order = list(range(logits.shape[1]))
    random.shuffle(order)
    options = {"teacher_target": teacher_target, "detach_teachers": detach}
    for before, after in zip(
        stage1_loss(logits, targets, **options),
        stage1_loss(logits[:, order], targets, **options),
        strict=True,
    ):
        torch.testing.assert_close(before, after)
    torch.testing.assert_close(
        balanced_softmax(logits, targets, counts),
        balanced_softmax(logits[:, order], targets, counts),
    )


@settings(max_examples=30)
@given(problems)
def test_a_single_expert_has_nothing_to_learn_from_itself(drawn) -> None:
    logits, targets = drawn[0][:, :1], drawn[1]
    assert mutual_distillation(logits).item() == 0
    transfer = dynamic_knowledge_transfer(logits, targets, teacher_target="masked")
    assert transfer.item() < 1e-6  # the student's masked target keeps a mass of e**-30


@settings(max_examples=30)
@given(problems, st.sampled_from(TEACHER_TARGETS), st.booleans())
def test_batchmean_is_mean_times_classes(drawn, teacher_target, detach) -> None:
    logits, targets, _ = drawn
    options = {"teacher_target": teacher_target, "detach_teachers": detach}
    classes = logits.shape[2]
    mean = stage1_loss(logits, targets, kl_reduction="mean", **options)
    scaled = stage1_loss(
        logits,
        targets,
        kl_reduction="batchmean",
        dkt_weight=10 / classes,
        mutual_weight=1 / classes,
        **options,
    )
    torch.testing.assert_close(mean.total, scaled.total)


@settings(max_examples=30)
@given(problems, st.booleans())
def test_detaching_teachers_keeps_the_values(drawn, masked) -> None:
    logits, targets, _ = drawn
    target = "masked" if masked else "zero"
    flowing, stopped = (
        stage1_loss(logits, targets, detach_teachers=detach, teacher_target=target)
        for detach in (False, True)
    )
    for before, after in zip(flowing, stopped, strict=True):
        torch.testing.assert_close(before, after)


def test_no_loss_reads_a_value_from_the_device() -> None:
    """Tensors without values stand for those of a GPU while a step is recorded."""
    logits = torch.zeros(8, 3, 10, device="meta", requires_grad=True)
    targets = torch.zeros(8, dtype=torch.int64, device="meta")
    counts = torch.ones(10, dtype=torch.int64, device="meta")
    for teacher_target in TEACHER_TARGETS:
        terms = stage1_loss(
            logits,
            targets,
            objective="balanced_softmax",
            class_counts=counts,
            detach_teachers=True,
            teacher_target=teacher_target,
            mutual_teachers="correct",
        )
        terms.total.backward()
    balanced_softmax(logits, targets, counts, label_smoothing=0.1).backward()
    assert logits.grad is not None


# Number formats.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("teacher_target", TEACHER_TARGETS)
def test_half_precision_logits_give_losses_in_float32(dtype, teacher_target) -> None:
    drawn, targets, counts = problem((8, 3, 100), spread=8.0)
    half = drawn.detach().to(dtype).requires_grad_()
    single = half.detach().float().requires_grad_()
    options = {"teacher_target": teacher_target}
    for ours, expected in zip(
        (*stage1_loss(half, targets, **options), balanced_softmax(half, targets, counts)),
        (*stage1_loss(single, targets, **options), balanced_softmax(single, targets, counts)),
        strict=True,
    ):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, expected)
    stage1_loss(half, targets, **options).total.backward()
    stage1_loss(single, targets, **options).total.backward()
    assert half.grad is not None
    assert single.grad is not None
    assert torch.equal(half.grad, single.grad.to(dtype))


def test_losses_stay_in_float32_under_autocast() -> None:
    drawn, targets, counts = problem((4, 3, 100))
    logits = drawn.detach().float()
    expected = (*stage1_loss(logits, targets), balanced_softmax(logits, targets, counts))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = (*stage1_loss(logits, targets), balanced_softmax(logits, targets, counts))
    assert ours == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("teacher_target", TEACHER_TARGETS)
@pytest.mark.parametrize("classes", [2, 10, 365])
def test_large_logits_stay_finite(dtype, teacher_target, classes) -> None:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (16, 3, classes), generator=generator) * 2 - 1
    logits = (300.0 * signs).to(dtype).requires_grad_()
    targets = torch.randint(classes, (16,), generator=generator)
    counts = torch.logspace(0, 6, classes)
    for detach in (False, True):
        terms = stage1_loss(logits, targets, teacher_target=teacher_target, detach_teachers=detach)
        for loss in (*terms, balanced_softmax(logits, targets, counts)):
            assert loss.isfinite()
            (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
            assert gradient.isfinite().all()


def test_consistency_by_hand() -> None:
    # One image, two experts, two classes; the second expert is wrong on the weak view.
    weak = torch.tensor([[[math.log(3.0), 0.0], [0.0, 1.0]]])  # probabilities 3/4, 1/4
    strong = torch.tensor([[[0.0, 0.0], [5.0, 5.0]]], requires_grad=True)  # 1/2, 1/2
    loss = consistency(strong, weak.requires_grad_(), torch.tensor([0]))
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    torch.testing.assert_close(strong.grad, torch.tensor([[[-0.25, 0.25], [0.0, 0.0]]]))
    assert weak.grad is None


def test_consistency_of_equal_views_is_nothing() -> None:
    logits = 5 * torch.randn(7, 3, 11, generator=torch.Generator().manual_seed(0))
    targets = logits[:, 0].argmax(dim=-1)
    assert consistency(logits, logits, targets).item() == pytest.approx(0, abs=1e-6)
    halved = consistency(torch.cat([logits, logits]), torch.cat([logits, -logits]),
                         torch.cat([targets, targets]))  # fmt: skip
    assert halved >= 0
