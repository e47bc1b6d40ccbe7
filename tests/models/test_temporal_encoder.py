"""The temporal encoders against the original's values, and the mistakes that these reveal."""

import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support import golden_data
from xgenmm.config import TemporalConfig
from xgenmm.evaluation.case import TOLERANCES
from xgenmm.evaluation.golden import golden_model
from xgenmm.models.resampler import PerceiverResampler
from xgenmm.models.temporal_encoder import (
    GroupedTokenTuringMachine,
    PositionCodes,
    SelfAttention,
    TokenLearner,
    TokenTuringMachineUnit,
)
from xgenmm.models.xgenmm import XGenMM

KINDS = ("v15_video_gttm", "v15_video_tl")


@pytest.fixture(scope="module", params=KINDS)
def golden(request: pytest.FixtureRequest) -> tuple[XGenMM, dict[str, torch.Tensor]]:
    return load_golden(request.param)


@pytest.fixture(scope="module")
def gttm() -> tuple[XGenMM, dict[str, torch.Tensor]]:
    return load_golden("v15_video_gttm")


def load_golden(name: str) -> tuple[XGenMM, dict[str, torch.Tensor]]:
    folder = golden_data.folder(name)
    model = golden_model(folder, json.loads((folder / "cases.json").read_text()))
    return model, load_file(folder / "activations.safetensors")


def largest_difference(model: XGenMM, activations: dict[str, torch.Tensor], clip: str) -> float:
    """How far the clip's vision tokens are from the original's."""
    found = model.clip_tokens(list(activations[f"{clip}.latents.0"]))
    return (found - activations[f"{clip}.vision_tokens.0"]).abs().max().item()


@pytest.mark.parametrize("clip", ["eight_frames", "one_frame"])
def test_vision_tokens_of_a_clip_equal_the_original(
    golden: tuple[XGenMM, dict[str, torch.Tensor]], clip: str
) -> None:
    assert largest_difference(*golden, clip) < 5e-6


# Mistakes that are easy to make: what to replace, and by what.


def norm_first(self: PerceiverResampler, latents: torch.Tensor) -> torch.Tensor:
    assert self.temporal_encoder is not None
    return self.projection(self.temporal_encoder(self.norm(latents)))


def no_norm(self: PerceiverResampler, latents: torch.Tensor) -> torch.Tensor:
    assert self.temporal_encoder is not None
    return self.projection(self.temporal_encoder(latents))


def unit(
    *, residual: bool = True, read: bool = False, old_memory: bool = True
) -> Callable[..., torch.Tensor]:
    def forward(
        self: TokenTuringMachineUnit, memory: torch.Tensor, step: torch.Tensor
    ) -> torch.Tensor:
        tokens = torch.cat([memory, step], dim=1)
        if read:
            tokens = self.read_layer(tokens)
        for layer in self.process_layers:
            assert isinstance(layer, nn.ModuleList)
            for part in layer:
                tokens = part(tokens) + (tokens if residual else 0)
        return self.write_layer(torch.cat([memory, tokens], dim=1) if old_memory else tokens)

    return forward


def mean_of_normed(self: TokenLearner, tokens: torch.Tensor) -> torch.Tensor:
    normed = self.norm(tokens)
    return self.mlp(normed).softmax(dim=-2).mT @ normed


def one_norm(self: TokenLearner, tokens: torch.Tensor) -> torch.Tensor:
    return self.mlp(tokens).softmax(dim=-2).mT @ tokens


def across_groups(attention: SelfAttention, tokens: torch.Tensor) -> torch.Tensor:
    joined = tokens.flatten(0, 1)[None]
    return WITHIN_GROUPS(attention, joined).view_as(tokens)


def output(pool: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def forward(self: GroupedTokenTuringMachine, latents: torch.Tensor) -> torch.Tensor:
        memory: torch.Tensor = self.initial_memory
        for step in latents + self.pos_emb(len(latents), latents.device)[:, None]:
            memory = self.ttm_unit(memory, step[:, None])
        return pool(memory)

    return forward


def no_codes(self: PositionCodes, count: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(count, self.width)


def halves(self: PositionCodes, count: int, device: torch.device) -> torch.Tensor:
    codes = CODES(self, count, device)
    return torch.cat([codes[:, 0::2], codes[:, 1::2]], dim=1)


def from_one(self: PositionCodes, count: int, device: torch.device) -> torch.Tensor:
    return CODES(self, count + 1, device)[1:]


def reversed_frames(self: GroupedTokenTuringMachine, latents: torch.Tensor) -> torch.Tensor:
    return IN_ORDER(self, latents.flip(0))


WITHIN_GROUPS, CODES = SelfAttention.forward, PositionCodes.forward
IN_ORDER = GroupedTokenTuringMachine.forward
MISTAKES: dict[str, tuple[type[nn.Module], str, Callable[..., torch.Tensor]]] = {
    "norm before the encoder": (PerceiverResampler, "to_tokens", norm_first),
    "no norm after the encoder": (PerceiverResampler, "to_tokens", no_norm),
    "read layer used": (TokenTuringMachineUnit, "forward", unit(read=True)),
    "attention across groups": (SelfAttention, "forward", across_groups),
    "no residual": (TokenTuringMachineUnit, "forward", unit(residual=False)),
    "mean of normed tokens": (TokenLearner, "forward", mean_of_normed),
    "one norm, not two": (TokenLearner, "forward", one_norm),
    "written from new tokens only": (TokenTuringMachineUnit, "forward", unit(old_memory=False)),
    "maximum of the memory": (
        GroupedTokenTuringMachine,
        "forward",
        output(lambda memory: memory.amax(dim=1)),
    ),
    "last slot of the memory": (
        GroupedTokenTuringMachine,
        "forward",
        output(lambda memory: memory[:, -1]),
    ),
    "no positions": (PositionCodes, "forward", no_codes),
    "sines, then cosines": (PositionCodes, "forward", halves),
    "positions from 1": (PositionCodes, "forward", from_one),
    "frames reversed": (GroupedTokenTuringMachine, "forward", reversed_frames),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_golden_data_reveals_a_mistake(
    gttm: tuple[XGenMM, dict[str, torch.Tensor]], mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*MISTAKES[mistake])
    assert largest_difference(*gttm, "eight_frames") > 1000 * TOLERANCES["vision_tokens"]


def test_mistakes_differ_from_the_encoder_in_nothing_else(
    gttm: tuple[XGenMM, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TokenTuringMachineUnit, "forward", unit())
    monkeypatch.setattr(
        GroupedTokenTuringMachine, "forward", output(lambda memory: memory.mean(dim=1))
    )
    assert largest_difference(*gttm, "eight_frames") < 5e-6


def test_token_learner_does_not_know_the_order_of_frames() -> None:
    model, activations = load_golden("v15_video_tl")
    latents = list(activations["eight_frames.latents.0"])
    expected = model.clip_tokens(latents)
    torch.testing.assert_close(model.clip_tokens(latents[::-1]), expected, rtol=0, atol=1e-5)


def test_positions_are_not_rounded_to_bfloat16() -> None:
    expected = PositionCodes(1152)(32, torch.device("cpu"))
    codes = PositionCodes(1152).to(torch.bfloat16)
    assert codes.inv_freq.dtype == torch.bfloat16
    assert torch.equal(codes(32, torch.device("cpu")), expected)
    encoder = GroupedTokenTuringMachine(TemporalConfig(num_layers=1), 48, 4).to(torch.bfloat16)
    latents = torch.randn(3, 4, 48, dtype=torch.bfloat16)
    steps = list[torch.Tensor]()
    encoder.ttm_unit.register_forward_pre_hook(lambda _, inputs: steps.append(inputs[1]))
    assert encoder(latents).dtype == torch.bfloat16
    exact = latents[2].float() + PositionCodes(48)(3, latents.device)[2]
    assert torch.equal(steps[2][:, 0], exact.to(torch.bfloat16))
