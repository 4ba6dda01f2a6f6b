"""Failures that shipped elsewhere, as edits of this library that bring each of them back, and the tests that must notice."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

PACKAGE = Path("genloss_kernels")
CE, LINEAR, SHARDS = "losses/cross_entropy/", "losses/linear_cross_entropy/", "losses/vocab_parallel/"
HF = "integrations/transformers/"


class Fault(NamedTuple):
    """``old``, which occurs once in the package's ``file``, becomes ``new``; each of ``tests`` fails in ``mode``."""

    failure: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    mode: str

    @property
    def path(self) -> str:
        return (PACKAGE / self.file).as_posix()

    def mutated(self, root: Path) -> bytes:
        source = (root / self.path).read_text()
        if source.count(self.old) != 1:
            raise ValueError(f"{self.path} holds {self.old!r} {source.count(self.old)} times, where once is wanted")
        return source.replace(self.old, self.new).encode()


def _losses(name: str) -> str:
    return f"tests/losses/test_{name}"


_CE, _LINEAR = _losses("cross_entropy.py::"), _losses("linear_cross_entropy.py::")
_BCE, _KL, _GAN = (_losses(f"{name}.py::") for name in ("binary_cross_entropy", "gaussian_kl", "adversarial"))
_REGRESSION, _NLL = _losses("regression.py::"), _losses("gaussian_nll.py::")
_MODELS, _TRAINING = "tests/integrations/test_transformers.py::", "tests/integrations/test_transformers_training.py::"
_RANKS = "tests/distributed/test_vocab_parallel.py::test_on_ranks"

FAULTS = [
    Fault(
        "caller's logits overwritten, or a second backward scaled twice (Liger)",
        "the gradient is written over the logits",
        CE + "op.py",
        "grad_logits = gradient_like(logits) if need_logits else None",
        "grad_logits = logits if need_logits else None",
        (_CE + "test_known_failure_overwritten_logits",),
        "eager",
    ),
    Fault(
        "caller's logits overwritten, or a second backward scaled twice (Liger)",
        "gradients made in the forward are handed over twice",
        "core/handover.py",
        'ctx.made if compiling else ctx.__dict__.pop("made", None)',
        "ctx.made",
        (_LINEAR + "test_known_failure_retained_graph",),
        "eager",
    ),
    Fault(
        'reduction="none" used the first row\'s upstream gradient (Liger #968, #1298)',
        "every row reads the first one's",
        CE + "kernels.py",
        "grad_loss_ptr + row * grad_loss_stride",
        "grad_loss_ptr + row * 0",
        (_CE + "test_known_failure_first_rows_upstream_gradient",),
        "kernels",
    ),
    Fault(
        'reduction="none" used the first row\'s upstream gradient (Liger #968, #1298)',
        "every chunk of rows reads the first one's",
        LINEAR + "chunks.py",
        "tuple(_part(g, chunk.rows) for g in grads)",
        "tuple(_part(g, slice(0, chunk.rows.stop - chunk.rows.start)) for g in grads)",
        (_LINEAR + "test_options",),
        "eager",
    ),
    Fault(
        "wrong loss under torch.compile with ignored rows (Liger #1338)",
        "no row is ignored while compiling",
        CE + "api.py",
        "    options = Options(\n        ignore_index,\n",
        "    options = Options(\n        -1 if torch.compiler.is_compiling() else ignore_index,\n",
        (_CE + "test_known_failure_compile",),
        "eager",
    ),
    Fault(
        "wrong loss under torch.compile with ignored rows (Liger #1338)",
        "ignored rows are gathered while compiling",
        LINEAR + "api.py",
        "return wanted and not torch.compiler.is_compiling() and not backend.composite(input, target)",
        "return wanted",
        (_LINEAR + "test_compiled_rows_are_not_gathered_where_their_number_may_not_be_known",),
        "eager",
    ),
    Fault(
        "gradient 20 to 100% off where the target's probability is near 1 (Liger #1329)",
        "the label's probability less 1, after rounding",
        CE + "kernels.py",
        "at_label = of_label * complement + (of_probability - of_label) * tl.exp(log_prob)",
        "at_label = of_probability * tl.exp(log_prob).to(tl.bfloat16).to(DTYPE) - of_label",
        (_CE + "test_known_failure_gradient_of_a_probable_target", _LINEAR + "test_known_failure_probability_near_one"),
        "kernels",
    ),
    Fault(
        "gradient 20 to 100% off where the target's probability is near 1 (Liger #1329)",
        "probabilities are rounded to the logits' dtype",
        CE + "eager.py",
        'dy = torch.softmax(y, dim, out=grad_logits if in_place else scratch.take("dy", y.shape, y.dtype, y.device))',
        "dy = torch.softmax(y, dim).to(grad_logits.dtype).to(y.dtype)",
        (_CE + "test_known_failure_gradient_of_a_probable_target",),
        "eager",
    ),
    Fault(
        "padded lanes leak mass under softcap (CCE, fla, Unsloth #10616)",
        "lanes are masked before the softcap",
        CE + "kernels.py",
        '        y = tl.where(live, y, -float("inf"))\n',
        "        y = tl.where(live, y, -softcap)\n",
        (_CE + "test_known_failure_padded_lanes_under_softcap",),
        "kernels",
    ),
    Fault(
        "vocabulary-parallel smoothing by the local vocabulary, log(0), an outlier (Megatron #7464, Liger)",
        "a rank smooths over its own classes",
        SHARDS + "merge.py",
        "return reference.combine(sums, head.target, weight, None, head.options, 1, head.layout.vocab_size)",
        "return reference.combine(sums, head.target, weight, None, head.options, 1, head.layout.sizes[0])",
        (_RANKS,),
        "eager",
    ),
    Fault(
        "vocabulary-parallel smoothing by the local vocabulary, log(0), an outlier (Megatron #7464, Liger)",
        "a rank's share of the mass by the log of an exponential",
        SHARDS + "merge.py",
        "return torch.where(top.isinf(), top, top + log_total), shifted - log_total",
        "return torch.where(top.isinf(), top, top + log_total), (shifted - log_total).exp().log()",
        (_RANKS, "tests/distributed/test_vocab_parallel_merge.py::test_known_failure_smoothing_with_an_outlier"),
        "eager",
    ),
    Fault(
        "vocabulary-parallel smoothing by the local vocabulary, log(0), an outlier (Megatron #7464, Liger)",
        "the log of probabilities",
        CE + "eager.py",
        'log_p = torch.log_softmax(y, within, out=scratch.take("log_p", y.shape, dtype, y.device))',
        "log_p = torch.softmax(y, within).log()",
        (_CE + "test_known_failure_smoothing_with_an_outlier",),
        "eager",
    ),
    Fault(
        "backward skipped where the upstream gradient is 1 (TransformerEngine #2139)",
        "nothing is written at 1",
        CE + "eager.py",
        "    weight = None if weight is None else weight.to(accumulator(logits.dtype))\n    rows = row_gradients(",
        "    if grads[0] is not None and (grads[0] == 1).all():\n        return\n"
        "    weight = None if weight is None else weight.to(accumulator(logits.dtype))\n    rows = row_gradients(",
        (_CE + "test_known_failure_backward_skipped_at_upstream_1",),
        "eager",
    ),
    Fault(
        "backward skipped where the upstream gradient is 1 (TransformerEngine #2139)",
        "gradients made in the forward are never scaled",
        "core/scaling_kernel.py",
        "tl.where(x == 0.0, x, x * factor)",
        "x",
        (_LINEAR + "test_divisor", _LINEAR + "test_scaling_by_one_touches_nothing"),
        "kernels",
    ),
    Fault(
        "weight gradient summed in bf16 over chunks (Liger #512, #827, axolotl #1601)",
        "the sum has the weight's dtype",
        LINEAR + "chunks.py",
        "self.weight = make(head.linear_weight, dtype=acc) if need_weight else None",
        "self.weight = make(head.linear_weight) if need_weight else None",
        (_LINEAR + "test_known_failure_weight_gradient_summed_in_half_precision", _LINEAR + "test_dtype_of_accumulation"),
        "eager",
    ),
    Fault(
        "target out of range: silent, loss 0 with a gradient, or stored out of bounds (Liger FLCE, flash-attn)",
        "nobody looks",
        CE + "api.py",
        "checks.class_indices(target, input.size(1) if input.dim() > 1 else input.size(0), ignore_index)",
        "pass",
        (_CE + "test_known_failure_target_out_of_range",),
        "eager",
    ),
    Fault(
        "target out of range: silent, loss 0 with a gradient, or stored out of bounds (Liger FLCE, flash-attn)",
        "the row's gradient is that of a class of its own",
        CE + "kernels.py",
        '        maximum = tl.where(valid & (inside == 0), float("nan"), maximum)\n',
        "",
        (_CE + "test_known_failure_target_out_of_range", _LINEAR + "test_label_out_of_range_on_a_device"),
        "kernels",
    ),
    Fault(
        "target out of range: silent, loss 0 with a gradient, or stored out of bounds (Liger FLCE, flash-attn)",
        "the row's gradient is the first class's",
        CE + "eager.py",
        '        dy.masked_fill_(rows.outside.unsqueeze(dim), float("nan"))\n',
        "        pass\n",
        (_CE + "test_known_failure_target_out_of_range", _LINEAR + "test_label_out_of_range_on_a_device"),
        "eager",
    ),
    Fault(
        "running maximum started at 0: loss -inf below -104 (FlagGems)",
        "the maximum starts at 0",
        "core/softmax.py",
        "return low, zero, zero, zero, zero, index, zero, zero, low, index",
        "return zero, zero, zero, zero, zero, index, zero, zero, low, index",
        (_CE + "test_known_failure_running_maximum_started_at_0",),
        "kernels",
    ),
    Fault(
        "wrong log-probabilities where V is no multiple of 256 or 1024 (verl #2656, #2899)",
        "the last block is left out",
        CE + "kernels.py",
        "    live = lane < tl.multiple_of(end - full, VEC)\n    y = _logits(logits_ptr + first + places, live,",
        "    live = lane < 0\n    y = _logits(logits_ptr + first + places, live,",
        (_CE + "test_known_failure_classes_no_multiple_of_a_block",),
        "kernels",
    ),
    Fault(
        "int32 offsets past 2**31 elements (pytorch #111484, fla #1080, trl #7266)",
        "a row's index is 32 bits wide",
        CE + "kernels.py",
        "        split = 0\n    row = row.to(tl.int64)\n",
        "        split = 0\n",
        (_CE + "test_known_failure_int32_offsets",),
        "kernels",
    ),
    Fault(
        "retain_graph fails; double backward silently wrong (QuACK #209, Liger JSD)",
        "gradients of linear cross entropy are constants",
        LINEAR + "functions.py",
        "        needed = needed_of(ctx.scalars[9])\n        if torch.is_grad_enabled():",
        "        needed = needed_of(ctx.scalars[9])\n        if False:",
        (_LINEAR + "test_second_derivatives",),
        "eager",
    ),
    Fault(
        "retain_graph fails; double backward silently wrong (QuACK #209, Liger JSD)",
        "gradients of cross entropy are constants",
        CE + "op.py",
        "        if torch.is_grad_enabled():\n            if ctx.in_place:",
        "        if False:\n            if ctx.in_place:",
        (_CE + "test_known_failure_retained_graph_and_double_backward",),
        "eager",
    ),
    Fault(
        "all tokens ignored: division by zero (Unsloth #7677)",
        "an ignored row's gradient is not 0 times anything",
        CE + "kernels.py",
        "dx = narrowed(tl.where(valid, dy * logit_scale, 0.0), grad_pointers)",
        "dx = narrowed(dy * logit_scale, grad_pointers)",
        (_CE + "test_known_failure_all_tokens_ignored",),
        "kernels",
    ),
    Fault(
        "all tokens ignored: division by zero (Unsloth #7677)",
        "an ignored row's gradient is not 0 times anything",
        CE + "eager.py",
        "        dy.masked_fill_(rows.ignored.unsqueeze(dim), 0.0)\n",
        "        pass\n",
        (_CE + "test_known_failure_all_tokens_ignored", _LINEAR + "test_all_ignored_and_no_rows"),
        "eager",
    ),
    Fault(
        "micro-batches mis-scaled, a mean of means (Liger #802, transformers #37886)",
        "the divisor is left out of the gradient",
        CE + "eager.py",
        "        grad = grad / options.divisor\n",
        "        pass\n",
        (
            _CE + "test_known_failure_accumulated_micro_batches",
            _LINEAR + "test_known_failure_micro_batches_of_unequal_length",
        ),
        "eager",
    ),
    Fault(
        "micro-batches mis-scaled, a mean of means (Liger #802, transformers #37886)",
        "num_items_in_batch is left out",
        HF + "deferred.py",
        '"divisor": as_divisor(num_items_in_batch, hidden.device),',
        '"divisor": None,',
        (
            _TRAINING + "test_micro_batches_add_up_to_the_batch",
            _TRAINING + "test_trainer_with_one_and_four_accumulation_steps",
        ),
        "eager",
    ),
    Fault(
        "head weight read outside its module under FSDP2; ZeRO-3's empty weight (trl #3368, #5891, #6372)",
        "the loss is computed outside the layer's call",
        HF + "deferred.py",
        "return call.check(self._head(hidden, call))",
        "return call.loss(self._head, hidden)",
        (_TRAINING + "test_weight_gathered_by_the_layers_hooks", _TRAINING + "test_two_ranks_of_fsdp2"),
        "eager",
    ),
    Fault(
        "head weight read outside its module under FSDP2; ZeRO-3's empty weight (trl #3368, #5891, #6372)",
        "a sharded weight passes for a whole one",
        HF + "heads.py",
        'if hasattr(parts.weight, "full_tensor"):',
        "if False:",
        (_TRAINING + "test_sharded_weight_outside_its_module_is_refused",),
        "eager",
    ),
    Fault(
        "head weight read outside its module under FSDP2; ZeRO-3's empty weight (trl #3368, #5891, #6372)",
        "a DTensor passes for a plain tensor, and nothing for a weight",
        LINEAR + "api.py",
        "if linear_weight.numel() == 0 and vocab_size is None:",
        "if False:",
        (_LINEAR + "test_bad_input",),
        "eager",
    ),
    Fault(
        "LoRA on the head silently frozen (TRL #5977)",
        "the adapters are left out",
        HF + "heads.py",
        "for name in _adapters(head):\n        # Columns",
        "for name in ():\n        # Columns",
        (_TRAINING + "test_adapters_learn_as_natively",),
        "eager",
    ),
    Fault(
        "LoRA on the head silently frozen (TRL #5977)",
        "any adapter passes for LoRA",
        HF + "heads.py",
        "    variants = [name for name in _adapters(head) if name in head.lora_variant]\n",
        "    variants = []\n",
        (_TRAINING + "test_adapter_of_another_kind_is_refused_not_frozen",),
        "eager",
    ),
    Fault(
        "softcap fails to compile; fp64 scalars 24 times slower (Liger #1362)",
        "the softcap is an argument of fp64 within the loop",
        CE + "kernels.py",
        "    softcap = scalar(softcap, DTYPE)\n    z_loss = scalar(z_loss, DTYPE)\n    inverse_softcap = 1.0 / softcap\n"
        "    uniform = smoothing / n_cols\n    if SPLIT:\n",
        "    z_loss = scalar(z_loss, DTYPE)\n    inverse_softcap = 1.0 / softcap\n"
        "    uniform = smoothing / n_cols\n    if SPLIT:\n",
        ("tests/meters/test_machine_code.py::test_two_special_functions_an_element_under_a_softcap",),
        "eager",
    ),
    Fault(
        "softcap fails to compile; fp64 scalars 24 times slower (Liger #1362)",
        "the operator takes no softcap where it is compiled",
        CE + "api.py",
        "        None if softcap is None else float(softcap),\n",
        "        None if softcap is None or torch.compiler.is_compiling() else float(softcap),\n",
        (_CE + "test_known_failure_compile",),
        "eager",
    ),
    Fault(
        "BCE NaN at infinite logits; log(1 + exp(-x)) 0 for x over 17 (pytorch #102894, FlagGems)",
        "0 times infinity",
        "losses/binary_cross_entropy/kernels.py",
        "linear = tl.where(slope == 0.0, 0.0, slope * size)",
        "linear = slope * size",
        (_BCE + "test_known_failure_infinite_logits",),
        "kernels",
    ),
    Fault(
        "BCE NaN at infinite logits; log(1 + exp(-x)) 0 for x over 17 (pytorch #102894, FlagGems)",
        "the logarithm of a sum with 1",
        "losses/binary_cross_entropy/kernels.py",
        "log1p_share(tl.exp(-size))",
        "tl.log(1.0 + tl.exp(-size))",
        (_BCE + "test_known_failure_small_losses",),
        "kernels",
    ),
    Fault(
        "KL: exp(logvar) overflows; mean meaning two things (PyTorch-VAE #16, pytorch #2259)",
        "the inverse of a deviation overflows",
        "losses/gaussian_kl/kernels.py",
        "inverse = tl.exp(tl.minimum(-0.5 * prior, LIMIT))",
        "inverse = tl.exp(-prior)",
        (_KL + "test_equal_narrow_gaussians_are_at_distance_0",),
        "kernels",
    ),
    Fault(
        "KL: exp(logvar) overflows; mean meaning two things (PyTorch-VAE #16, pytorch #2259)",
        "batchmean means the mean",
        "losses/gaussian_kl/api.py",
        "chosen = Reduction.SAMPLE if capacity is not None else _REDUCTIONS[reduction]",
        'chosen = Reduction.SAMPLE if capacity is not None else _REDUCTIONS[reduction.replace("batch", "")]',
        (_KL + "test_shapes",),
        "eager",
    ),
    Fault(
        "gradient penalty NaN at zero norm, or one norm over the batch (pytorch #2534, wgan-gp #27)",
        "the root is differentiated at 0",
        "losses/adversarial/reference.py",
        "    zero = squares == 0.0\n    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())",
        "    return squares.sqrt()",
        (_GAN + "test_a_norm_of_zero",),
        "eager",
    ),
    Fault(
        "gradient penalty NaN at zero norm, or one norm over the batch (pytorch #2534, wgan-gp #27)",
        "1 divided by a norm of 0",
        "losses/adversarial/kernels.py",
        "inverse = tl.where(norm == 0.0, 0.0, 1.0 / tl.where(norm == 0.0, 1.0, norm))",
        "inverse = 1.0 / norm",
        (_GAN + "test_a_norm_of_zero",),
        "kernels",
    ),
    Fault(
        "gradient penalty NaN at zero norm, or one norm over the batch (pytorch #2534, wgan-gp #27)",
        "one norm over the batch",
        "losses/adversarial/reference.py",
        "return wide.square().flatten(1).sum(1) if grad.dim() > 1 else wide.square()",
        "return wide.square().sum().expand(grad.size(0)) if grad.dim() > 1 else wide.square()",
        (_GAN + "test_penalties",),
        "eager",
    ),
    Fault(
        "Huber wrong below -delta; L1 gradient +1 at 0 (attorch)",
        "the slope below -delta is that above",
        "losses/regression/kernels.py",
        "below = tl.where(difference <= -threshold, -slope, curvature * difference)",
        "below = tl.where(difference <= -threshold, slope, curvature * difference)",
        (_REGRESSION + "test_value_and_gradients",),
        "kernels",
    ),
    Fault(
        "Huber wrong below -delta; L1 gradient +1 at 0 (attorch)",
        "the sign of 0 is 1",
        "losses/regression/kernels.py",
        "dx = tl.where(difference > 0.0, weight,",
        "dx = tl.where(difference >= 0.0, weight,",
        (_REGRESSION + "test_gradient_of_l1_at_0_is_0",),
        "kernels",
    ),
    Fault(
        "host synchronisation in every step (Liger, gaussian_nll_loss)",
        "labels are read wherever they are",
        "core/checks.py",
        "    if target.numel() == 0 or not reads_values(target):\n        return\n    low, high = target.aminmax()",
        "    if target.numel() == 0:\n        return\n    low, high = target.aminmax()",
        (_CE + "test_known_failure_host_synchronisation",),
        "kernels",
    ),
    Fault(
        "host synchronisation in every step (Liger, gaussian_nll_loss)",
        "variances are read wherever they are",
        "core/checks.py",
        "    if value.numel() == 0 or not reads_values(value):\n        return\n    lowest =",
        "    if value.numel() == 0:\n        return\n    lowest =",
        (_NLL + "test_nothing_waits_for_a_device", _NLL + "test_negative_variances_count_as_eps_on_a_device"),
        "kernels",
    ),
]
