r"""What the paper claims, tried at small scale: one text, one tokenizer, equal tokens, models that differ in one thing.

    python tools/study.py runs/study                     # small: about an hour on one CPU core
    python tools/study.py runs/study --scale medium      # two to three hours on one CPU core
    python tools/study.py runs/study --scale full        # about ten hours on a CPU, minutes on a GPU
    python tools/study.py runs/study --parts table toy

Parts: `table` trains left to right (AR), masked diffusion with attention both ways (MDLM, written here), and this model at
several alpha_0, with several seeds, and compares perplexities. `toy` compares the estimators with the exact likelihood of a model
so small that all orders can be summed. `gradients` compares the losses for alpha_0 = 1: how much a gradient varies from batch to
batch, and what equal arithmetic buys. `pareto` writes texts in T passes, and has them judged by an AR model of another seed.
`latency` is the time of a text against its length. `scaling` fits a law to the bounds of four narrower models, and compares what
it predicts for the width of the others with what those have.

Each trained model and each part leaves a file in the folder; what is there is not made again, so a killed study goes on. The
text is the sources of Python's standard library. The end is results.json, results.md and the pictures.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from esolm_megatron.config import ModelConfig, ObjectiveConfig
from esolm_megatron.config.optim import OptimConfig
from esolm_megatron.data.corpus import python_library_documents
from esolm_megatron.data.tokenizer import train_tokenizer
from esolm_megatron.evaluation import evaluate
from esolm_megatron.inference import sample
from esolm_megatron.inference.decoding.draw import Draw, draw_tokens
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.size import layer_parameters, mask_capacity, masked_share
from esolm_megatron.model.transformer import EsoLM, initialise
from esolm_megatron.objective.esolm import draw_diffusion, draw_step, mean_loss, part_sums
from esolm_megatron.objective.likelihood import importance_weighted, log_likelihood
from esolm_megatron.objective.noise import words
from esolm_megatron.train.schedule import learning_rate


@dataclass(frozen=True)
class Scale:
    """Sizes of a study."""

    layers: int
    width: int
    heads: int
    length: int
    vocab: int
    batch: int
    steps: int
    seeds: int
    corpus_bytes: int
    rows: int
    texts: int


SCALES = {
    "tiny": Scale(1, 32, 2, 16, 300, 8, 12, 2, 60_000, 16, 8),
    "small": Scale(3, 96, 4, 64, 512, 32, 500, 3, 3_000_000, 256, 64),
    "medium": Scale(4, 128, 4, 64, 1024, 32, 1000, 3, 8_000_000, 256, 64),
    "full": Scale(6, 256, 8, 128, 2048, 64, 4000, 3, 20_000_000, 512, 256),
}
"""tiny is for tests, and shows nothing."""
ALPHAS = (0.125, 0.25, 0.5, 1.0)
MDLM, AR, ANY_ORDER = "MDLM", "AR", "Eso-LM 1, any-order loss"
KINDS: dict[str, float] = {AR: 0.0, **{f"Eso-LM {a:g}": a for a in ALPHAS}, MDLM: 1.0}
"""Name -> alpha_0."""
SCALED = "Eso-LM 0.25"
"""What `scaling` trains at several widths."""


class Study:
    """A folder with what has been found."""

    def __init__(self, folder: Path, scale: Scale, device: str):
        self.folder, self.scale, self.device = folder, scale, torch.device(device)
        folder.mkdir(parents=True, exist_ok=True)
        plan, file = asdict(scale), folder / "scale.json"
        if file.exists() and json.loads(file.read_text()) != plan:
            raise SystemExit(f"{folder} holds a study of another scale: choose another folder")
        file.write_text(json.dumps(plan))
        self.train_rows, self.rows, self.tokens_per_byte = self._data()
        vocab = int(max(self.train_rows.max(), self.rows.max())) + 2
        self.shape = ModelConfig(
            num_layers=scale.layers, hidden_size=scale.width, num_heads=scale.heads, vocab_size=vocab, seq_length=scale.length,
        )  # fmt: skip

    def _data(self) -> tuple[NDArray[np.int64], NDArray[np.int64], float]:
        """Rows to train on (N, L), rows kept aside (M, L), and tokens of a byte."""
        texts, size = [], 0
        for _, text in itertools.islice(python_library_documents(), 0, None, 3):
            if size < self.scale.corpus_bytes:
                texts.append(text)
                size += len(text.encode())
        folder = self.folder / "tokenizer"
        tokenizer = train_tokenizer(texts, self.scale.vocab, folder)
        held = [text for number, text in enumerate(texts) if number % 10 == 0]
        rows = []
        for part in ([text for text in texts if text not in held], held):
            ids = np.array([x for text in part for x in [*tokenizer.encode(text), tokenizer.eos_id]], np.int64)
            rows.append(ids[: len(ids) // self.scale.length * self.scale.length].reshape(-1, self.scale.length))
        return rows[0], rows[1][: self.scale.rows], sum(map(len, rows)) * self.scale.length / size

    def once(self, name: str, make: Callable[[], object]) -> object:
        """What `make` gives, made once."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            found = json.dumps(make())
            file.with_suffix(".new").write_text(found)
            file.with_suffix(".new").replace(file)
        return json.loads(file.read_text())

    # -------------------------------------------------------------------------------------------------- models

    def new_model(self, seed: int, width: int | None = None) -> EsoLM:
        """Random weights."""
        shape = self.shape if width is None else self.shape.model_copy(update={"hidden_size": width})
        model = EsoLM(ModelConfig(**shape.model_dump(exclude_unset=True)), PlainLinears(torch.float32, self.device))
        initialise(model, seed)
        return model

    def model(self, kind: str, seed: int, width: int | None = None) -> EsoLM:
        """A trained model; trains it if it is not there. width: other than the study's."""
        file, model = self.folder / f"{self.stem(kind, seed, width)}.safetensors", self.new_model(seed, width)
        if not file.exists():
            losses = self._trained(model, kind, seed)
            save_file({name: x.detach().cpu() for name, x in model.named_parameters()}, file.with_suffix(".new"))
            (self.folder / f"{file.stem}.losses.json").write_text(json.dumps(losses))
            file.with_suffix(".new").replace(file)
        model.load_state_dict(load_file(file))
        return model.eval()

    def _trained(self, model: EsoLM, kind: str, seed: int) -> list[float]:
        """Train in place; the losses. The same rows come to every kind, in an order that the seed decides."""
        s = self.scale
        steps = s.steps // 2 if kind == ANY_ORDER else s.steps  # which feeds two tokens for one
        optim = OptimConfig(lr=3e-3, warmup_steps=min(50, steps // 4), schedule="cosine", min_lr_fraction=0.1)
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer, losses = torch.optim.AdamW(groups, betas=(0.9, 0.98)), []
        for step in track(range(steps), f"{kind}, seed {seed}", console=Console(stderr=True), transient=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, optim, steps)
            loss = self.loss(model, kind, step, seed)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(round(loss.item(), 4))
        return losses

    def objective(self, kind: str) -> ObjectiveConfig:
        """alpha_0 = 1 trains on the unweighted loss, as the reference does."""
        alpha_0 = KINDS.get(kind, 1.0)
        how = "any_order" if kind == ANY_ORDER else "low_var" if alpha_0 == 1 else "elbo"
        return ObjectiveConfig(alpha_0=alpha_0, diffusion_loss=how)

    def loss(self, model: EsoLM, kind: str, step: int, seed: int, objective: ObjectiveConfig | None = None) -> Tensor:
        """The loss of a step's batch, with gradients."""
        s, objective = self.scale, objective or self.objective(kind)
        chosen = words(s.batch, seed, step, "rows") % np.uint64(len(self.train_rows))
        tokens, valid = self.train_rows[chosen.astype(np.int64)], np.ones((s.batch, s.length), bool)
        rows = np.arange(s.batch)
        if kind == MDLM:
            noised = draw_diffusion(tokens, valid, rows, s.batch, objective, seed, step)
            return self._mdlm(model, tokens, noised.masked, noised.weights) / tokens.size
        noised = draw_step(
            tokens, valid, rows, objective, mask_id=model.shape.mask_id, global_batch_size=s.batch, num_micro_batches=1,
            capacity=mask_capacity(s.length, objective.alpha_0), key=(seed, step),
        )  # fmt: skip
        batch = noised.micro_batches[0].to(self.device)
        losses = model(batch.tokens, batch.positions, batch.attend, targets=batch.targets, last=batch.last)
        return mean_loss(part_sums(losses, batch), noised.num_valid.to(self.device))

    def _mdlm(
        self, model: EsoLM, tokens: NDArray[np.int64], masked: NDArray[np.bool_], weights: NDArray[np.float64]
    ) -> Tensor:
        """Weighted sum of -log p at masked places, each of which sees all places of its row."""
        fed = torch.from_numpy(np.where(masked, model.shape.mask_id, tokens)).to(self.device)
        at = torch.from_numpy(np.flatnonzero(weights)).to(self.device)
        targets = torch.from_numpy(tokens.ravel()).to(self.device)[at]
        counts = torch.from_numpy(weights.ravel()).to(self.device)[at]
        losses = model(fed.flatten(), self._positions(len(fed)), both_ways(*fed.shape), places=at, targets=targets)
        return (losses * counts.to(losses)).sum()

    def _positions(self, rows: int) -> Tensor:
        return torch.arange(self.scale.length, device=self.device).repeat(rows)

    # -------------------------------------------------------------------------------------------------- parts

    def table(self) -> dict[str, list[dict[str, float]]]:
        """Kind -> for each seed, bounds in nats per token of the rows kept aside."""
        seeds, out = range(self.scale.seeds), {}
        for seed, kind in itertools.product(seeds, KINDS):  # a study that is cut short has whole seeds
            name = f"table-{kind.replace(' ', '_')}-{seed}"
            found = self.once(name, lambda kind=kind, seed=seed: self._bounds(self.model(kind, seed), kind))
            out.setdefault(kind, []).append(found)
        return out

    @torch.inference_mode()
    def _bounds(self, model: EsoLM, kind: str) -> dict[str, float]:
        valid = np.ones(self.rows.shape, bool)
        if kind == MDLM:
            objective, total, count = ObjectiveConfig(alpha_0=1.0), 0.0, len(self.rows)
            for draw in range(8):
                for at in range(0, len(self.rows), 64):
                    part = self.rows[at : at + 64]
                    part, ids = self.rows[at : at + 64], np.arange(at, min(at + 64, count))
                    noised = draw_diffusion(part, valid[ids], ids, count, objective, draw, "study")
                    total += float(self._mdlm(model, part, noised.masked, noised.weights))
            return {"nelbo": total / self.rows.size / 8}
        found, bounds = [], ObjectiveConfig(alpha_0=KINDS[kind])
        for draw in range(8 if bounds.alpha_0 else 1):
            found.append(
                evaluate(model, [(self.rows, valid)], bounds, orders=8 if draw == 0 else 1, seed=draw, batch_size=32)
            )
        nelbo = sum(x.nelbo.nats_per_token for x in found) / len(found)
        first = found[0]
        exact = {x: getattr(first, x).nats_per_token for x in ("any_order", "importance_weighted")}
        return {"nelbo": nelbo, **exact}

    @torch.inference_mode()
    def toy(self) -> dict[str, list[float]]:
        """Nats per token of rows of 5 places under a random model of 3 tokens: exact, and by estimator."""
        length, rows, out = 5, 32, {}
        shape = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, vocab_size=4, seq_length=length)
        model = EsoLM(shape, PlainLinears(torch.float64))
        initialise(model, 1)
        generator = torch.Generator().manual_seed(2)
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64), alpha=1.5 / p.shape[-1] ** 0.5)
        tokens = torch.from_numpy(words(rows * length, "toy").astype(np.int64) % 3).view(rows, length)
        valid = np.ones((rows, length), bool)
        for alpha_0 in (0.25, 0.5, 1.0):
            orders = list(weighted_orders(length, alpha_0))
            log_p = torch.stack(
                [log_likelihood(model, tokens, torch.tensor(order).expand(rows, -1)) for order, _ in orders]
            )
            weights = torch.tensor([weight for _, weight in orders], dtype=torch.float64).log()[:, None]
            exact = -torch.logsumexp(log_p + weights, 0).mean().item() / length
            draws = [
                evaluate(model, [(tokens.numpy(), valid)], ObjectiveConfig(alpha_0=alpha_0), seed=n)
                for n in range(10 if self.scale.steps < 100 else 200)
            ]
            mean = -(log_p * weights.exp()).sum(0)
            out[f"{alpha_0:g}"] = {
                "exact": exact,
                "nelbo": sum(x.nelbo.nats_per_token for x in draws) / len(draws),
                "any_order": mean.mean().item() / length,
                **{f"importance_weighted, K = {k}": self._weighted(log_p, weights, k) / length for k in (1, 10, 100)},
            }
        return out

    @staticmethod
    def _weighted(log_p: Tensor, weights: Tensor, count: int) -> float:
        """The importance-weighted estimate of -log p by `count` orders, a mean over 200 tries."""
        generator = torch.Generator().manual_seed(count)
        tries = [
            torch.multinomial(weights[:, 0].exp(), count, replacement=True, generator=generator) for _ in range(200)
        ]
        return -sum(importance_weighted(log_p[chosen]).mean().item() for chosen in tries) / len(tries)

    def gradients(self) -> dict[str, object]:
        """Of the losses for alpha_0 = 1: relative variance of a batch's gradient, and the bound that equal arithmetic buys."""
        model, out = self.model("Eso-LM 1", 0), {}
        for how in ("elbo", "low_var", "any_order"):
            total, squares, count = None, 0.0, 4 if self.scale.steps < 100 else 64
            for step in range(count):
                model.zero_grad()
                self.loss(
                    model, "Eso-LM 1", 10**6 + step, 0, ObjectiveConfig(alpha_0=1.0, diffusion_loss=how)
                ).backward()
                flat = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
                total = flat if total is None else total + flat
                squares += float(flat.square().sum())
            mean = float((total / count).square().sum())
            out[how] = {"relative_variance": (squares / count - mean) / mean * count / (count - 1)}
        seeds = range(self.scale.seeds)
        out["any_order_bounds"] = [self._bounds(self.model(ANY_ORDER, seed), "Eso-LM 1") for seed in seeds]
        out["curves"] = {kind: self._curve(kind) for kind in ("Eso-LM 1", ANY_ORDER)}
        return out

    def _curve(self, kind: str) -> dict[str, list[float]]:
        """Nats per predicted token while a kind trained, means over seeds and 20 stretches, by the tokens that it was fed."""
        s, objective = self.scale, self.objective(kind)
        files = [self.folder / f"{self.stem(kind, seed)}.losses.json" for seed in range(s.seeds)]
        losses = np.mean([json.loads(file.read_text()) for file in files], 0) / masked_share(objective)
        fed = s.batch * s.length * (2 if kind == ANY_ORDER else 1)
        parts = np.array_split(np.arange(len(losses)), min(20, len(losses)))
        return {
            "tokens_fed": [float(p.mean() + 1) * fed for p in parts],
            "nats": [float(losses[p].mean()) for p in parts],
        }

    @staticmethod
    def stem(kind: str, seed: int, width: int | None = None) -> str:
        """What files of a model are called."""
        return f"{kind.replace(' ', '_').replace(',', '')}-{seed}{'' if width is None else f'-{width}'}"

    @torch.inference_mode()
    def pareto(self) -> list[dict[str, object]]:
        """Texts in T passes: nats per token under the AR model of another seed, entropy, seconds of a text."""
        s, out = self.scale, []
        judge = self.model(AR, s.seeds - 1)
        steps = [t for t in (8, 16, 32, 64, 128) if t <= s.length]
        for kind, top_p in itertools.product((AR, "Eso-LM 0.25", "Eso-LM 1", MDLM), (0.9, 1.0)):
            model = self.model(kind, 0)
            for count in [s.length] if kind == AR else steps:
                best = math.inf
                for _ in range(2):
                    begun = time.perf_counter()
                    if kind == MDLM:
                        texts = self._uncached(model, count, top_p)
                    else:
                        texts = sample(model, s.texts, s.length, alpha_0=KINDS[kind], steps=count, top_p=top_p, seed=5)[
                            0
                        ]
                    best = min(best, time.perf_counter() - begun)
                left_to_right = torch.arange(s.length, device=texts.device).expand_as(texts)
                nats = -log_likelihood(judge, texts, left_to_right).double().mean().item() / s.length
                counts = [torch.bincount(row).double() for row in texts]
                entropy = [-(p * p.log()).sum().item() for p in ((c[c > 0] / c.sum()) for c in counts)]
                out.append({"kind": kind, "top_p": top_p, "steps": count, "nats": nats, "entropy": sum(entropy) / len(entropy),
                            "seconds_per_text": best / s.texts})  # fmt: skip
        return out

    def _uncached(self, model: EsoLM, steps: int, top_p: float) -> Tensor:
        """Texts (B, L) of masked diffusion: all places in each pass, of which T-th parts are filled in random order."""
        s = self.scale
        order = torch.from_numpy(
            np.argsort(words(s.texts * s.length, "mdlm", steps).reshape(s.texts, -1), axis=1).astype(np.int64)
        )
        fed = torch.full((s.texts, s.length), model.shape.mask_id, device=self.device)
        for number, part in enumerate(torch.tensor_split(order.to(self.device), steps, 1)):
            at = (torch.arange(s.texts, device=self.device)[:, None] * s.length + part).flatten()
            logits = model(fed.flatten(), self._positions(s.texts), both_ways(*fed.shape), places=at)
            raw = torch.from_numpy(words(len(at), "mdlm", steps, number).astype(np.int64) >> 1).to(self.device)
            fed.view(-1)[at] = draw_tokens(logits, raw, Draw(top_p=top_p))[0]
        return fed

    def scaling(self) -> dict[str, object]:
        """Bounds (nats per token, one a seed) of models of several widths, and a law fitted to all but the widest."""
        widths = [self.scale.width * eighths // 8 for eighths in (2, 3, 4, 6)]
        seeds, sizes = range(self.scale.seeds), []
        for seed, width in itertools.product(seeds, widths):
            self.model(SCALED, seed, width)  # a study that is cut short has whole seeds
        for width in [*widths, None]:
            models = [self.model(SCALED, seed, width) for seed in seeds]
            inner = models[0].shape.num_layers * layer_parameters(models[0].shape)
            nelbo = [self._bounds(model, SCALED)["nelbo"] for model in models]
            sizes.append({"width": width or self.scale.width, "parameters": inner, "nelbo": nelbo})
        law = fitted_law([x["parameters"] for x in sizes[:-1]], [spread(x["nelbo"])[0] for x in sizes[:-1]])
        return {
            "sizes": sizes,
            "law": law,
            "tokens": self.scale.steps * self.scale.batch * self.scale.length,
            "predicted": law["floor"] + law["scale"] * sizes[-1]["parameters"] ** -law["power"],
        }

    @torch.inference_mode()
    def latency(self) -> list[dict[str, object]]:
        """Seconds of one text with random weights: left to right, and in L / 4 passes by this model, and without a cache."""
        out, longest = [], 8 * self.scale.length
        for length in (n for n in (16, 32, 64, 128, 256, 512, 1024) if n <= longest):
            shape = self.shape.model_copy(update={"seq_length": length})
            model = EsoLM(shape, PlainLinears(torch.float32, self.device))
            initialise(model, 0)
            positions, steps = torch.arange(length, device=self.device), length // 4

            def uncached(
                model: EsoLM = model, positions: Tensor = positions, length: int = length, steps: int = steps
            ) -> None:
                fed = torch.full((length,), model.shape.mask_id, device=self.device)
                for part in torch.tensor_split(positions, steps):
                    logits = model(fed, positions, both_ways(1, length), places=part)
                    fed[part] = draw_tokens(logits, part)[0]

            ways = {
                AR: lambda model=model, length=length: sample(model, 1, length, alpha_0=0.0, steps=1),
                "Eso-LM 1": lambda model=model, length=length, steps=steps: sample(
                    model, 1, length, alpha_0=1.0, steps=steps
                ),
                MDLM: uncached,
            }
            for kind, way in ways.items():
                times = []
                for _ in range(3):
                    begun = time.perf_counter()
                    way()
                    times.append(time.perf_counter() - begun)
                out.append({"kind": kind, "length": length, "seconds": min(times)})
        return out


def fitted_law(parameters: list[int], nats: list[float]) -> dict[str, float]:
    """floor + scale * parameters^-power, by least squares with floor and scale not below 0."""
    best = (math.inf, {})
    for power in np.arange(0.02, 1.5, 0.005):
        columns = np.stack([np.ones(len(nats)), np.asarray(parameters, float) ** -power], 1)
        (floor, scale), *_ = np.linalg.lstsq(columns, np.asarray(nats), rcond=None)
        if floor < 0:
            floor, scale = 0.0, float(columns[:, 1] @ nats / (columns[:, 1] @ columns[:, 1]))
        error = float(np.square(columns @ [floor, scale] - nats).sum())
        if scale >= 0 and error < best[0]:
            best = (error, {"floor": float(floor), "scale": float(scale), "power": float(power)})
    return best[1]


def both_ways(rows: int, length: int) -> Callable[..., Tensor]:
    """Attention in which each place of a row sees all of its places."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(rows, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows * length, *q.shape[1::2])

    return attend


def weighted_orders(length: int, alpha_0: float) -> Iterator[tuple[list[int], float]]:
    """Every order that generation may have, with its probability: some places in random order, the others left to right."""
    for first in itertools.product((False, True), repeat=length):
        early = [n for n in range(length) if first[n]]
        late = [n for n in range(length) if not first[n]]
        weight = alpha_0 ** len(early) * (1 - alpha_0) ** len(late) / math.factorial(len(early))
        if weight:
            yield from (([*order, *late], weight) for order in itertools.permutations(early))


# ------------------------------------------------------------------------------------------------------------ results

PARTS = ("table", "toy", "gradients", "pareto", "latency", "scaling")


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def report(study: Study, results: dict[str, object]) -> str:
    """results.md, and the pictures beside it."""
    s = study.scale
    model = f"{s.layers} layers, {s.width} wide, {s.length} tokens a row, {study.shape.vocab_size} ids with the mask"
    trained = f"{s.steps} steps of {s.batch} rows of {len(study.train_rows):,}; {len(study.rows)} rows kept aside"
    lines = [
        f"{model}; {trained}; {study.tokens_per_byte:.3f} tokens a byte; mean and standard deviation over {s.seeds} seeds."
    ]
    if "table" in results:
        lines += [
            "",
            "| model | perplexity of the bound (NELBO) | any-order, exact given the order | importance-weighted, K = 8 |",
            "|---|---|---|---|",
        ]
        for kind, found in results["table"].items():
            cells = []
            for name in ("nelbo", "any_order", "importance_weighted"):
                values = [math.exp(x[name]) for x in found if name in x]
                cells.append("{:.2f} ± {:.2f}".format(*spread(values)) if values else "")
            lines.append(f"| {kind} | {' | '.join(cells)} |")
    if "toy" in results:
        names = list(next(iter(results["toy"].values())))
        lines += ["", f"| alpha_0 | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        lines += [
            f"| {alpha} | {' | '.join(f'{found[name]:.4f}' for name in names)} |"
            for alpha, found in results["toy"].items()
        ]
    if "gradients" in results:
        g = results["gradients"]
        lines += ["", "| loss for alpha_0 = 1 | relative variance of a batch's gradient |", "|---|---|"]
        lines += [f"| {how} | {g[how]['relative_variance']:.2f} |" for how in ("elbo", "low_var", "any_order")]
        cells = [
            "{:.2f} ± {:.2f}".format(*spread([math.exp(x[name]) for x in g["any_order_bounds"]]))
            for name in ("nelbo", "any_order")
        ]
        lines += [
            "",
            f"Trained on any_order with half the steps (as much arithmetic): NELBO {cells[0]}, any-order {cells[1]}.",
        ]
    if "pareto" in results:
        lines += [
            "",
            "| model | nucleus | passes | perplexity under AR | entropy | ms a text |",
            "|---|---|---|---|---|---|",
        ]
        for x in results["pareto"]:
            found = f"{math.exp(x['nats']):.1f} | {x['entropy']:.2f} | {1e3 * x['seconds_per_text']:.2f}"
            lines.append(f"| {x['kind']} | {x['top_p']} | {x['steps']} | {found} |")
    if "scaling" in results:
        x, law = results["scaling"], results["scaling"]["law"]
        form = f"{law['floor']:.3f} + {law['scale']:.3g} / N^{law['power']:.3f}"
        lines += ["", f"| {SCALED}, width | parameters N in blocks | nats per token (NELBO) |", "|---|---|---|"]
        lines += [
            f"| {y['width']} | {y['parameters']:,} | {'{:.4f} ± {:.4f}'.format(*spread(y['nelbo']))} |"
            for y in x["sizes"]
        ]
        lines += ["", f"The law fitted to all but the last, {form}, predicts {x['predicted']:.4f} for the last."]
    draw(results, study.folder / "results.png")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, object], picture: Path) -> None:
    """One picture with a panel for each part that has something to see."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    parts = [part for part in ("table", "gradients", "pareto", "latency", "scaling") if part in results]
    if not parts:
        return
    across, down = min(len(parts), 3), -(-len(parts) // 3)
    figure, axes = plt.subplots(down, across, figsize=(5.2 * across, 4 * down), squeeze=False)
    for axis in axes.flat[len(parts) :]:
        axis.set_visible(False)
    for axis, part in zip(axes.flat, parts, strict=False):
        if part == "table":
            pairs = [spread([math.exp(x["nelbo"]) for x in found]) for found in results["table"].values()]
            axis.bar(
                list(results["table"]), [x for x, _ in pairs], yerr=[e for _, e in pairs], color="tab:blue", capsize=3
            )
            axis.tick_params(axis="x", rotation=45)
            axis.set(ylabel="perplexity (bound)", title="held-out text")
        elif part == "gradients":
            for kind, curve in results[part]["curves"].items():
                axis.plot(curve["tokens_fed"], curve["nats"], ".-", label=kind)
            axis.set(xlabel="tokens fed", ylabel="nats per predicted token", title="losses for alpha_0 = 1 in training")
            axis.legend(fontsize=7)
        elif part == "scaling":
            found, law = results[part]["sizes"], results[part]["law"]
            means, errors = zip(*(spread(x["nelbo"]) for x in found), strict=True)
            axis.errorbar(
                [x["parameters"] for x in found],
                means,
                errors,
                fmt="o",
                label="trained; the last was predicted",
                capsize=3,
            )
            line = np.geomspace(found[0]["parameters"], found[-1]["parameters"], 50)
            axis.plot(line, law["floor"] + law["scale"] * line ** -law["power"], "--", label="law fitted to the others")
            axis.set(
                xscale="log", xlabel="parameters in blocks", ylabel="nats per token (bound)", title=f"scaling, {SCALED}"
            )
            sizes = [x["parameters"] for x in found]
            axis.set_xticks(sizes, labels=[f"{size / 1000:.0f}K" for size in sizes])
            axis.minorticks_off()
            axis.legend(fontsize=7)
        elif part == "pareto":
            for kind, top_p in dict.fromkeys((x["kind"], x["top_p"]) for x in results["pareto"]):
                found = [x for x in results["pareto"] if (x["kind"], x["top_p"]) == (kind, top_p)]
                places = [1e3 * x["seconds_per_text"] for x in found], [math.exp(x["nats"]) for x in found]
                axis.plot(*places, "o-" if top_p == 1 else "o--", label=f"{kind}, nucleus {top_p:g}", ms=4)
            axis.set(
                xscale="log",
                yscale="log",
                xlabel="ms a text",
                ylabel="perplexity under AR",
                title="quality against time",
            )
            axis.legend(fontsize=7)
        else:
            for kind in dict.fromkeys(x["kind"] for x in results["latency"]):
                found = [x for x in results["latency"] if x["kind"] == kind]
                axis.plot([x["length"] for x in found], [x["seconds"] for x in found], "o-", label=kind, ms=4)
            axis.set(
                xscale="log",
                yscale="log",
                xlabel="places of a text",
                ylabel="seconds",
                title="one text, L / 4 passes (AR: L)",
            )
            lengths = sorted({x["length"] for x in results["latency"]})
            axis.set_xticks(lengths, labels=list(map(str, lengths)))
            axis.minorticks_off()
            axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main() -> int:
    """Do what is left of a study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", choices=list(SCALES), default="small")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    study = Study(args.folder, SCALES[args.scale], args.device)
    for part in args.parts:
        begun = time.monotonic()
        study.once(part, getattr(study, part))
        print(f"{part}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    results = {part: json.loads(file.read_text()) for part in PARTS if (file := args.folder / f"{part}.json").exists()}
    (args.folder / "results.json").write_text(json.dumps({"scale": asdict(study.scale), **results}, indent=1) + "\n")
    text = report(study, results)
    (args.folder / "results.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
