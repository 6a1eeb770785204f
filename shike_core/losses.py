"""SHIKE's losses: pure functions on logits ``(batch, num_experts, num_classes)``.

The defaults are the semantics of the authors' public code; each place where it differs from what
one would write from the paper is a named option. Losses are computed in float32 whatever the
logits' format: in half precision 1 to 3 % of the non-target probabilities underflow to 0. No
function reads a value back from the device, so that a training step can be recorded and compiled.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shike_core.config import KlReduction, MutualTeachers, Objective, TeacherTarget

MASKED_LOGIT = -30.0
"""The student's logit of its target class in knowledge transfer (the authors' value)."""
NO_MASS_LOGIT = -1e4
"""A logit whose probability is exactly 0 in float32, and still finite."""


class Stage1Loss(NamedTuple):
    """Terms of representation learning, scalars; `total` is the sum of the others.

    `cross_entropy` is of the adjusted logits if the objective is balanced softmax.
    """

    total: Tensor
    cross_entropy: Tensor
    dynamic_knowledge_transfer: Tensor
    mutual_distillation: Tensor


def stage1_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    objective: Objective = "cross_entropy",
    class_counts: Tensor | None = None,
    dkt_weight: float = 10.0,
    mutual_weight: float = 1.0,
    temperature: float = 1.0,
    mutual_teachers: MutualTeachers = "all",
    kl_reduction: KlReduction = "mean",
    detach_teachers: bool = False,
    teacher_target: TeacherTarget = "zero",
) -> Stage1Loss:
    """Loss of representation learning (paper section 3, L_ce + L_nt + L_mu).

    Args:
        logits: ``(batch, num_experts, num_classes)``.
        targets: ``(batch,)``, class indices.
        objective: what every expert learns from the labels: `summed_cross_entropy`, or
            `balanced_softmax`.
        class_counts: ``(num_classes,)``, for balanced softmax only.
        dkt_weight: weight of `dynamic_knowledge_transfer`, in the units of `kl_reduction`.
        mutual_weight: weight of `mutual_distillation`, in the units of `kl_reduction`.
        temperature: of mutual distillation; its gradients are scaled back by the square.
        mutual_teachers: of mutual distillation: all other experts, or those that are right.
        kl_reduction: ``mean`` over batch and classes, or ``batchmean``; a weight w in the first
            is a weight w / num_classes in the second.
        detach_teachers: stop gradients through both distillation targets.
        teacher_target: see `dynamic_knowledge_transfer`.

    Returns:
        The cross-entropy summed over experts and the distillation terms as they enter the total.
        A term of weight 0 is not computed.

    Raises:
        ValueError: the objective is balanced softmax and there are no class counts.
    """
    logits = _at_least_float32(logits)
    if objective == "cross_entropy":
        cross_entropy = summed_cross_entropy(logits, targets)
    elif class_counts is not None:
        cross_entropy = balanced_softmax(logits, targets, class_counts)
    else:
        raise ValueError("objective=balanced_softmax needs class_counts, got None; give them")
    transfer = mutual = logits.new_zeros(())
    if dkt_weight:
        transfer = dkt_weight * dynamic_knowledge_transfer(
            logits,
            targets,
            kl_reduction=kl_reduction,
            detach_teachers=detach_teachers,
            teacher_target=teacher_target,
        )
    if mutual_weight:
        mutual = mutual_weight * mutual_distillation(
            logits,
            targets if mutual_teachers == "correct" else None,
            temperature=temperature,
            kl_reduction=kl_reduction,
            detach_teachers=detach_teachers,
        )
    return Stage1Loss(cross_entropy + transfer + mutual, cross_entropy, transfer, mutual)


def balanced_softmax(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor,
    *,
    logit_adjustment: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Loss of classifier retraining: cross-entropy of ``z + log n``, summed over experts.

    Balanced softmax (Ren et al. 2020), as the paper uses it for its second stage; with a factor on
    ``log n``, the loss of logit adjustment (Menon et al. 2021).

    Args:
        logits: ``(batch, num_experts, num_classes)``.
        targets: ``(batch,)``, class indices.
        class_counts: ``(num_classes,)``, training images of each class, all positive.
        logit_adjustment: the factor, tau there.
        label_smoothing: see `summed_cross_entropy`; the adjusted logits are compared with it.
    """
    logits = _at_least_float32(logits)
    adjusted = logits + logit_adjustment * class_counts.to(logits).log()
    return summed_cross_entropy(adjusted, targets, label_smoothing=label_smoothing)


def summed_cross_entropy(
    logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy, mean over the batch and sum over experts.

    Args:
        logits: ``(batch, num_experts, num_classes)``.
        targets: ``(batch,)``, class indices.
        label_smoothing: share of the target that is spread evenly over all classes.
    """
    logits = _at_least_float32(logits)
    num_experts = logits.shape[1]
    return num_experts * F.cross_entropy(
        logits.flatten(0, 1),  # (batch * num_experts, num_classes)
        targets[:, None].expand(-1, num_experts).flatten(),
        label_smoothing=label_smoothing,
    )


def dynamic_knowledge_transfer(
    logits: Tensor,
    targets: Tensor,
    *,
    kl_reduction: KlReduction = "mean",
    detach_teachers: bool = False,
    teacher_target: TeacherTarget = "zero",
) -> Tensor:
    """Teach every expert the non-target classes, the consensus hardest negative apart.

    The teacher takes the experts' maximum for each negative class, but their mean for the hardest
    one, so that no single expert's mistake is passed on (paper section 3, DKT).

    Args:
        logits: ``(batch, num_experts, num_classes)``.
        targets: ``(batch,)``, class indices.
        kl_reduction: mean over batch and classes, or over the batch.
        detach_teachers: stop the gradient through the teacher.
        teacher_target: the teacher's logit of the target class is 0, so that some of its mass
            leaks there (the authors' code), or is masked out.
    """
    logits = _at_least_float32(logits)
    labels = torch.arange(logits.shape[-1], device=logits.device)
    is_target = labels == targets[:, None]  # (batch, num_classes)
    mean = logits.mean(dim=1)  # (batch, num_classes)
    hardest = mean.masked_fill(is_target, float("-inf")).argmax(dim=-1, keepdim=True)  # (batch, 1)
    teacher = logits.max(dim=1).values.scatter(1, hardest, mean.gather(1, hardest))
    teacher = teacher.masked_fill(is_target, 0.0 if teacher_target == "zero" else NO_MASS_LOGIT)
    if detach_teachers:
        teacher = teacher.detach()
    student = logits.masked_fill(is_target[:, None], MASKED_LOGIT)  # as logits
    log_teacher = teacher.log_softmax(dim=-1)[:, None]  # (batch, 1, num_classes)
    divergence = log_teacher.exp() * (log_teacher - student.log_softmax(dim=-1))
    return _reduce(divergence, kl_reduction)


def mutual_distillation(
    logits: Tensor,
    targets: Tensor | None = None,
    *,
    temperature: float = 1.0,
    kl_reduction: KlReduction = "mean",
    detach_teachers: bool = False,
) -> Tensor:
    """KL(p_j || p_i) summed over all ordered pairs of experts i != j (paper section 3).

    The sum over pairs is ``sum_j p_j (M log p_j - sum_i log p_i)``, so memory is linear in
    batch x experts x classes.

    Args:
        logits: ``(batch, num_experts, num_classes)``.
        targets: ``(batch,)``, class indices; if they are given, an expert j that is wrong about an
            image does not teach it to the others.
        temperature: divides the logits; the result is multiplied by its square.
        kl_reduction: mean over batch and classes, or over the batch.
        detach_teachers: stop the gradient through p_j.
    """
    logits = _at_least_float32(logits)
    log_student = (logits / temperature).log_softmax(dim=-1)
    # With a detached teacher the pair i = j still adds nothing: its gradient is p_j - p_j.
    log_teacher = log_student.detach() if detach_teachers else log_student
    all_students = log_student.sum(dim=1, keepdim=True)  # (batch, 1, num_classes)
    divergence = log_teacher.exp() * (logits.shape[1] * log_teacher - all_students)
    if targets is not None:
        divergence = divergence * (logits.argmax(dim=-1) == targets[:, None])[..., None]
    return temperature**2 * _reduce(divergence, kl_reduction)


def consistency(logits: Tensor, weak_logits: Tensor, targets: Tensor) -> Tensor:
    """Every expert teaches itself: KL(p_weak || p_strong), where it is right on the weak view.

    Weak-to-strong self-distillation (Zhao et al. 2023, MDCS, section 3.3).

    Args:
        logits: of the augmented images, ``(batch, num_experts, num_classes)``.
        weak_logits: of the same images, only cropped and mirrored; they are the teacher, so no
            gradient flows through them.
        targets: ``(batch,)``, class indices.

    Returns:
        Mean over the batch, sum over experts; an expert that is wrong on the weak view adds 0.
    """
    log_student = _at_least_float32(logits).log_softmax(dim=-1)
    log_teacher = _at_least_float32(weak_logits).detach().log_softmax(dim=-1)
    right = log_teacher.argmax(dim=-1) == targets[:, None]  # (batch, num_experts)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)
    return (divergence * right).sum() / len(logits)


def _reduce(divergence: Tensor, kl_reduction: KlReduction) -> Tensor:
    batch, _, num_classes = divergence.shape
    return divergence.sum() / (batch * num_classes if kl_reduction == "mean" else batch)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
