"""Pieces of training: losses (loss_*, loss_edge_*, gan_head_*), the learning rate (lr_cosine), Any-to-Bokeh's samples (aug_*)."""

import torch

from bokeh_core.training import any_to_bokeh_clips, losses, perturbation

from .runner import Case, unit, worst


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.numel() != theirs.numel():
        raise AssertionError(f"shape {list(ours.shape)}, expected {list(theirs.shape)}")
    return float((ours.double().flatten() - theirs.double().flatten()).abs().max())


@unit("loss_edge_")
def loss_edge(case: Case) -> tuple[float, float]:
    """BokehDiff's, with the gradient that reaches the unclamped prediction."""
    t, tolerance = case.tensors, case.meta["tolerance"]
    raw = t["in.pred_raw"].clone().requires_grad_()
    scales = case.meta["config"]["scales"]
    if scales != list(range(1, len(scales) + 1)):
        raise AssertionError(f"scales {scales}")
    edge = losses.edge_loss(raw.clamp(-1, 1), t["in.bokeh"], t["in.aif"], len(scales))
    edge.backward()
    mse = torch.nn.functional.mse_loss(raw.detach(), t["in.bokeh"])
    return worst(
        [
            (_error(edge.detach(), t["out.edge"]), tolerance),
            (_error(mse, t["out.mse"]), tolerance),
            (_error(raw.grad, t["out.grad_edge_wrt_pred_raw"]), tolerance),
        ]
    )


@unit("loss_")
def loss(case: Case) -> tuple[float, float]:
    """Any-to-Bokeh's."""
    t, tolerance = case.tensors, case.meta["tolerance"]
    pred, target = t["in.pred"], t["in.target"]
    l1, texture = (pred - target).abs().mean(), losses.texture_loss(pred, target)
    pairs = {
        "mid.sobel_mag_pred0": losses.sobel_magnitude(pred[:, 0]),
        "out.l1": l1,
        "out.gradient_loss": texture,
        "out.stage3_total": l1 + texture,
        "out.stage12_mse_of_stride8": torch.nn.functional.mse_loss(pred[..., ::8, ::8], target[..., ::8, ::8]),
    }
    return worst([(_error(ours, t[name]), tolerance) for name, ours in pairs.items()])


@unit("gan_head_")
def gan_head(case: Case) -> tuple[float, float]:
    """Calls in training state, one after the other; the state after the last where it is recorded. Losses summed over the batch."""
    t, config, tolerance = case.tensors, case.meta["config"], case.meta["tolerance"]
    head = losses.GanHead(config["in_ch"], config["out_ch"]).train()
    head.load_state_dict({name[2:]: tensor for name, tensor in t.items() if name.startswith("w.")})
    pairs, call = [], 0
    while f"out.logits_call{call}" in t:
        logits = head(t["in.features"]).detach()
        pairs.append((_error(logits, t[f"out.logits_call{call}"]), tolerance))
        call += 1
    state = head.state_dict()
    pairs += [(_error(state[name[10:]], tensor), tolerance) for name, tensor in t.items() if name.startswith("mid.after.")]
    targets = {"out.loss_G": losses.REAL, "out.loss_D_real": losses.REAL, "out.loss_D_fake": losses.FAKE}
    pairs += [(_error(losses.gan_loss(logits, target).sum(), t[name]), tolerance) for name, target in targets.items()]
    return worst(pairs)


@unit("lr_cosine")
def lr_cosine(case: Case) -> tuple[float, float]:
    t, config = case.tensors, case.meta["config"]
    ours = [losses.cosine(step, config["num_warmup_steps"], config["num_training_steps"]) for step in t["in.step"].tolist()]
    return _error(torch.tensor(ours, dtype=torch.float64), t["out.multiplier"]), case.meta["tolerance"]


def _recipe(config: dict, **names: str) -> perturbation.Recipe:
    """The published recipe with the constants that the case names. names: field -> key of the case's config."""
    given = {field: config[key] for field, key in names.items()}
    return perturbation.Recipe(**{field: tuple(value) if isinstance(value, list) else value for field, value in given.items()})


@unit("aug_elastic_")
def aug_elastic(case: Case) -> tuple[float, float]:
    """Tolerances as the case words them: displacement 1e-5; disparity 2e-3 on the scale 0..255; mask exact but for isolated ties."""
    t, config = case.tensors, case.meta["config"]
    (reach, other), (sigma, other_sigma) = config["alpha"], config["sigma"]
    if (reach, sigma) != (other, other_sigma):
        raise AssertionError("reach and sigma differ between x and y")
    recipe = perturbation.Recipe(reach=reach, sigma=sigma, kernel=config["kernel"])
    moved = perturbation.displacement(t["in.uniform_dx"][0, 0], t["in.uniform_dy"][0, 0], recipe)
    mixed, mask = perturbation.elastic(t["in.disparity"] / 255, t["in.mask"], moved)
    warped = perturbation.warp(t["in.disparity"] / 255, moved, "bilinear")
    differs = mask != t["out.elastic_mask"]
    return worst(
        [
            (_error(moved, t["mid.displacement"]), 1e-5),
            (float(differs.double().mean()), 1e-3),
            (_error(warped * 255, t["out.elastic_disparity"]), 2e-3),
            (_error((mixed * 255)[~differs], t["out.mixed"][~differs]), 2e-3),
        ]
    )


@unit("aug_perlin_")
def aug_perlin(case: Case) -> tuple[float, float]:
    t, config, tolerance = case.tensors, case.meta["config"], case.meta["tolerance"]
    recipe = _recipe(config, scales="scales", amplitudes="amplitudes", octaves="octaves")
    change = torch.zeros(config.get("height", 576), config.get("width", 1024))  # the recorded function has this size built in
    for y0, y1, x0, x1, value in config["mask_rects_y0_y1_x0_x1_value"]:
        change[y0:y1, x0:x1] = value
    field = perturbation.noise_field(change, tuple(value for _, value in config["draws"]), recipe)
    points = t["in.pnoise2_points"].numpy()
    samples = torch.from_numpy(perturbation.perlin(points[:, 0], points[:, 1], config["octaves"]))
    return worst(
        [
            (_error(field[change > 0], t["out.values_on_positive_mask"]), tolerance),
            (_error(field[change == 0][:1], t["out.value_outside"]), tolerance),
            (_error(field[change < 0][:1], t["out.values_on_negative_mask_first"]), tolerance),
            (_error(samples, t["out.pnoise2_samples"]), tolerance),
        ]
    )


class _Recorded:
    """Hands out recorded draws, numbers and uniform fields each in their order."""

    def __init__(self, draws: list, fields: list[torch.Tensor]):
        self.draws, self.fields = list(draws), list(fields)

    def uniform(self) -> float:
        return self._next("random")

    def integer(self, low: int, high: int) -> int:
        return self._next("np.randint")

    def choice(self, options) -> int:
        return self._next("choice")

    def field(self, height: int, width: int) -> torch.Tensor:
        return self.fields.pop(0)[0, 0]

    def _next(self, kind: str):
        found, value = self.draws.pop(0)
        if found != kind:
            raise AssertionError(f"a draw of kind {kind} is due, recorded is {found}")
        return value


@unit("aug_sample_")
def aug_sample(case: Case) -> tuple[float, float]:
    """Tolerances as the case words them: pictures 1e-4, disparity difference 1e-3, regions off by one on less than 0.5 % of the pixels."""
    t, meta, config = case.tensors, case.meta, case.meta["config"]

    def pictures(name):
        return t[name].float().permute(0, 3, 1, 2) / 255

    concept = config["concept"]
    k = torch.tensor(meta["bokeh_k_per_frame"] if config["K"] == "rand" else [float(config["K"])] * config["frames"], dtype=torch.float64)
    frames = any_to_bokeh_clips.Frames(
        pictures("in.aif_u8"),
        pictures("in.bokeh_u8"),
        t["in.disparity_u8"].float() / 255,
        any_to_bokeh_clips.visible(t["in.masks_u8"], concept) if isinstance(concept, int) else None,
        t["in.zf"],
        k,
    )
    kind, (start, *_) = meta["draws"][0]
    if (kind, start) != ("sample", meta["first_frame"]):
        raise AssertionError(f"first draw {kind} {start}")
    fields = sorted((name for name in t if name.startswith("in.uniform.")), key=lambda name: int(name.rpartition(".")[2]))
    draws = _Recorded(meta["draws"][1:], [t[name] for name in fields])
    probability = config["aug_depth_p"] if config["aug_depth"] else 0.0
    ours = any_to_bokeh_clips.training_sample(frames, tuple(config["sample_size"]), draws, probability)
    if draws.draws or draws.fields:
        raise AssertionError(f"{len(draws.draws)} recorded draws and {len(draws.fields)} fields were not used")
    step = (ours["region"][:, 0].int() - t["out.region"].int()).abs()
    return worst(
        [
            (_error(ours["sharp"], t["out.pixel_values"]), 1e-4),
            (_error(ours["bokeh"], t["out.bokeh_values"]), 1e-4),
            (_error(ours["difference"], t["out.coc_channel0"]), 1e-3),
            (float((step > 0).double().mean()) if int(step.max()) <= 1 else float(step.max()), 0.005),
            (_error(ours["k"], t["out.K"]), 0.0),
        ]
    )
