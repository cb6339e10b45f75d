"""A student of a few layers, distilled from the model that it will draft for (DistillSpec, 2310.08461).

It begins as the target with most layers left out, evenly, and learns to say what the target says at every position of
the target's own texts:

    loss = Σ_t KL(p_t ‖ q_t)        over the completion's positions, p the target's whole distribution, q the student's

Embedding and head stay the target's: they are most of a small student's weights, and already right.

Accept rates are read off the texts: at a position where the last i guesses were right, the student has the same text
before it as it has when it drafts, so α_{i+1} is how often it is right again.

Shapes: B texts, T positions, M positions asked about, J drafts in a row, V vocabulary.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.engine.cache import KVCache
from shoal.engine.local import pick_device
from shoal.engine.model import Decoder
from shoal.engine.source import LocalModel
from shoal.engine.speculation.eagle_training import Optimizer, Plan, Score, StepReport, batch_of
from shoal.engine.speculation.profile import FILE as PROFILE
from shoal.engine.speculation.writing import TargetText
from shoal.errors import ModelError

NOT_COPIED = ("config.json", "generation_config.json", PROFILE)
"""Small files of the target's folder that say something else of the student; the others are the tokenizer's."""

FROZEN = ("embed_tokens", "lm_head")


class StudentPupil:
    """A student and its teacher.

    Args:
        num_layers: the student's; fewer than the target's.
        dtype: bf16 or fp32, of both.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        ModelError: the target does not have more layers.
    """

    def __init__(self, target: LocalModel, num_layers: int, *, dtype: str, device: str, threads: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        where, config = pick_device(device), target.config()
        if num_layers >= config.num_hidden_layers:
            raise ModelError(
                f"a student of {num_layers} layers is no smaller than its target of {config.num_hidden_layers}.",
                "Give fewer --layers.",
            )
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        self._source = target
        self._target = Decoder(config, kind, where)
        tensors = target.tensors()
        self._target.load(tensors)
        own = copy.deepcopy(config)
        own.num_hidden_layers = num_layers
        if getattr(own, "layer_types", None):
            own.layer_types = own.layer_types[:num_layers]
        self.module: Any = AutoModelForCausalLM.from_config(own, dtype=kind).to(where)
        chosen = spread(config.num_hidden_layers, num_layers)
        renamed = {
            name if number is None else name.replace(f".{number}.", f".{chosen.index(number)}.", 1): tensor
            for name, tensor in tensors.items()
            if (number := _layer(name)) is None or number in chosen
        }
        missing, odd = self.module.load_state_dict(renamed, strict=False)
        assert not odd and all("lm_head" in name for name in missing), "only a tied head is not among the tensors"
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(not any(part in name for part in FROZEN))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What learns."""
        return {name: each for name, each in self.module.named_parameters() if each.requires_grad}

    def train(
        self, texts: Sequence[TargetText], plan: Plan, optimizer: Optimizer, begin: int = 0
    ) -> Iterator[StepReport]:
        """Steps `begin` + 1 … `plan.num_steps`; a report after each. A resumed training sees the same batches."""
        for step in range(begin, plan.num_steps):
            chosen = batch_of(len(texts), plan.batch_size, step, plan.seed)
            total, score, tokens = 0.0, None, 0
            for at in range(0, len(chosen), plan.microbatch):
                piece = [texts[index] for index in chosen[at : at + plan.microbatch]]
                loss, own = self._lesson(piece, plan.test_steps)
                (loss * len(piece) / len(chosen)).backward()
                optimizer.accumulate()
                total += float(loss.detach()) * len(piece) / len(chosen)
                score = own if score is None else score + own
                tokens += sum(len(text.token_ids) for text in piece)
            optimizer.step(plan.rate(step))
            assert score is not None
            yield StepReport(step + 1, total, tuple(score.accept), tokens)

    @torch.no_grad()
    def evaluate(self, texts: Sequence[TargetText], plan: Plan) -> tuple[float, list[float]]:
        """Mean loss and accept rates by depth over held-out texts."""
        total, score = 0.0, None
        for at in range(0, len(texts), plan.microbatch):
            piece = texts[at : at + plan.microbatch]
            loss, own = self._lesson(piece, plan.test_steps)
            total += float(loss) * len(piece)
            score = own if score is None else score + own
        assert score is not None
        return total / len(texts), score.accept

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: what learns. The rest is the target's, and its head may be its embedding."""
        return {name: each.detach() for name, each in self.parameters.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint; raises `RuntimeError` where it is of another student."""
        if state.keys() != self.parameters.keys():
            raise RuntimeError("other weights learn here")
        self.module.load_state_dict(dict(state), strict=False)

    def save(self, directory: Path) -> None:
        """Write the student as a checkpoint of its own, with the target's tokenizer."""
        directory.mkdir(exist_ok=True)
        self.module.save_pretrained(directory)
        for path in self._source.directory.iterdir():
            small = path.suffix in (".json", ".txt", ".model", ".jinja") and not path.name.endswith(".index.json")
            if path.is_file() and small and path.name not in NOT_COPIED:
                shutil.copyfile(path, directory / path.name)

    def _lesson(self, texts: Sequence[TargetText], num_steps: int) -> tuple[Tensor, Score]:
        """Loss a position, and how often guesses are right."""
        device = self._target.device
        lengths = [len(text.prompt_ids) + len(text.token_ids) for text in texts]
        rows = [
            [*text.prompt_ids, *text.token_ids, *[0] * (max(lengths) - n)]
            for text, n in zip(texts, lengths, strict=True)
        ]
        ids_BT = torch.tensor(rows, device=device)
        at_T = torch.arange(max(lengths), device=device)
        first_B1 = torch.tensor([[len(text.prompt_ids) - 1] for text in texts], device=device)
        asked_BT = (at_T >= first_B1) & (at_T < torch.tensor(lengths, device=device)[:, None] - 1)
        p_MV, best_M = self._taught(ids_BT, asked_BT)
        hidden_MH = self.module.model(input_ids=ids_BT, use_cache=False).last_hidden_state[asked_BT]
        log_q_MV = F.log_softmax(self.module.lm_head(hidden_MH).float(), dim=-1)
        loss = F.kl_div(log_q_MV, p_MV, reduction="batchmean")
        right = (log_q_MV.detach().argmax(dim=-1) == best_M).split(asked_BT.sum(dim=1).tolist())
        return loss, _score([row.tolist() for row in right], num_steps)

    def _taught(self, ids_BT: Tensor, asked_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The target's distribution and likeliest token where they are asked for."""
        target, (batch, longest) = self._target, ids_BT.shape
        arch = target.arch
        token_bytes = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * target.dtype.itemsize
        sizes = arch.num_layers, arch.num_kv_heads, arch.head_dim, batch, batch * (longest + 64) * token_bytes
        cache = KVCache(*sizes, target.dtype, target.device)
        cache.reserve(batch, longest, 0)
        start_B = torch.zeros(batch, dtype=torch.int64, device=target.device)
        logits_MV = target.logits(target.forward(ids_BT, start_B, cache)[asked_BT]).float()
        # What inference mode made cannot be differentiated through; copies can.
        return torch.softmax(logits_MV, dim=-1).clone(), logits_MV.argmax(dim=-1).clone()


def spread(num_layers: int, count: int) -> list[int]:
    """`count` of so many layers, evenly, first and last among them."""
    return [0] if count == 1 else [round(n * (num_layers - 1) / (count - 1)) for n in range(count)]


def _layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else None


def _score(rows: list[list[bool]], num_steps: int) -> Score:
    """Over every place at which drafting could begin: chains asked for and right, by depth."""
    right, asked = torch.zeros(num_steps), torch.zeros(num_steps)
    for row in rows:
        for begin in range(len(row)):
            for depth, ok in enumerate(row[begin : begin + num_steps]):
                asked[depth] += 1
                if not ok:
                    break
                right[depth] += 1
    return Score(right, asked)
