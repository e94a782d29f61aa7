"""Inputs of models that read more than the names of their arguments tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from families.inputs import BATCH, LENGTH, noise, pixels, tokens
from torch import Tensor

Inputs = dict[str, Tensor]


def _with_image_tokens(count: int, **more: Any) -> Callable[[Any], Inputs]:
    """An image, and ``count`` tokens for it at the front of the text."""

    def make(config: Any) -> Inputs:
        ids = tokens()
        ids[:, :count] = 90
        found = {"input_ids": ids, "pixel_values": pixels(config)}
        return {**found, **{name: value() for name, value in more.items()}}

    return make


def _kosmos2(config: Any) -> Inputs:
    places = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    places[:, 1 : 1 + config.latent_query_num] = 1
    return {"input_ids": tokens(), "pixel_values": pixels(config),
            "image_embeds_position_mask": places}  # fmt: skip


def _idefics(config: Any) -> Inputs:
    return {"input_ids": tokens(), "pixel_values": pixels(config)[:, None],
            "image_attention_mask": torch.ones(BATCH, LENGTH, 1, dtype=torch.long)}  # fmt: skip


def _codebooks(config: Any) -> Inputs:
    """Rows of one text token and one token of each codebook."""
    width = config.num_codebooks + 1
    return {"input_ids": tokens(length=LENGTH * width).view(BATCH, LENGTH, width) % 14 + 1}


def _dia(config: Any) -> Inputs:
    channels = config.decoder_config.num_channels
    ids = tokens(length=LENGTH * channels).view(BATCH, LENGTH, channels)
    return {"input_ids": tokens(), "decoder_input_ids": ids}


def _musicgen(config: Any) -> Inputs:
    books = config.decoder.num_codebooks
    return {"input_ids": tokens(),
            "decoder_input_ids": tokens(BATCH * books) % 14 + 1}  # fmt: skip


def _series(config: Any) -> Inputs:
    past = config.context_length + max(config.lags_sequence)
    ahead, features = config.prediction_length, config.num_time_features
    return {"past_values": noise(BATCH, past), "past_time_features": noise(BATCH, past, features),
            "past_observed_mask": torch.ones(BATCH, past),
            "future_values": noise(BATCH, ahead),
            "future_time_features": noise(BATCH, ahead, features)}  # fmt: skip


def _decisions(config: Any) -> Inputs:
    steps = torch.arange(LENGTH).expand(BATCH, -1)
    return {"states": noise(BATCH, LENGTH, config.state_dim),
            "actions": noise(BATCH, LENGTH, config.act_dim),
            "rewards": noise(BATCH, LENGTH, 1), "returns_to_go": noise(BATCH, LENGTH, 1),
            "timesteps": steps, "attention_mask": torch.ones_like(steps)}  # fmt: skip


def _positioned_patches(config: Any) -> Inputs:
    """Flattened patches of two images of 6 x 6, each with its column and row."""
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    places = torch.stack([columns.flatten(), rows.flatten()], -1).expand(BATCH, -1, -1)
    return {"pixel_values": noise(BATCH, 36, 3 * config.patch_size**2),
            "pixel_position_ids": places}  # fmt: skip


def _patch_rows(*shape: int) -> Callable[[Any], Inputs]:
    """Patches of two images of 4 x 4, each patch of this shape."""
    return lambda config: {"pixel_values": noise(32, *shape),
                           "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}  # fmt: skip


def _sized_patches(config: Any) -> Inputs:
    """The patches of two images of 4 x 4 in one row, and these sizes."""
    side = config.patch_size
    return {"pixel_values": noise(1, 3, side, 32 * side),
            "target_sizes": torch.tensor([[4, 4], [4, 4]], dtype=torch.int32)}  # fmt: skip


def _frames(config: Any) -> Inputs:
    """Rows of one spectrum each."""
    bins = getattr(config, "encoder_config", config).num_mel_bins
    return {"input_features": noise(BATCH, 64, bins)}


def _windows(config: Any) -> Inputs:
    return {"past_values": noise(BATCH, config.context_length, config.num_input_channels)}


def _flattened(config: Any) -> Inputs:
    """Patches behind their row and column."""
    place = torch.arange(1, LENGTH + 1)[None, :, None].expand(BATCH, -1, 2)
    width = config.vision_config.patch_embed_hidden_size
    return {"flattened_patches": torch.cat([place, noise(BATCH, LENGTH, width)], -1),
            "decoder_input_ids": tokens(seed=4)}  # fmt: skip


def _mel_mask(config: Any) -> Inputs:
    return {"audio_mel": noise(BATCH, 64, config.input_feat_size),
            "audio_mel_mask": torch.zeros(BATCH, 64, dtype=torch.bool)}  # fmt: skip


def _unequal_patches(config: Any) -> Inputs:
    """Flattened patches of an image of 4 x 4 and one of 3 x 4, which is filled up."""
    config = getattr(config, "vision_config", config)
    mask = (torch.arange(16) < torch.tensor([[16], [12]])).long()
    return {"pixel_values": noise(BATCH, 16, 3 * config.patch_size**2),
            "pixel_attention_mask": mask,
            "spatial_shapes": torch.tensor([[4, 4], [3, 4]])}  # fmt: skip


def _inkling2(config: Any) -> Inputs:
    side = config.patch_size * config.spatial_merge_size
    return {"pixel_values": noise(8, side, side, 3),
            "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]])}  # fmt: skip


INPUTS: dict[str, Callable[[Any], Inputs]] = {
    "blip-2": _with_image_tokens(4),
    "blip_2_qformer": lambda config: {
        "query_embeds": noise(BATCH, LENGTH, config.hidden_size),
        "encoder_hidden_states": noise(BATCH, 9, config.encoder_hidden_size),
    },
    "bridgetower": lambda config: {"input_ids": tokens(), "pixel_values": pixels(config),
                                   "pixel_mask": torch.ones(BATCH, 32, 32, dtype=torch.long)},
    "audio-spectrogram-transformer": lambda config: {
        "input_values": noise(BATCH, config.max_length, config.num_mel_bins)},
    "decision_transformer": _decisions,
    "dia": _dia,
    "diffusion_gemma": lambda config: {"input_ids": tokens(),
                                       "decoder_input_ids": tokens(seed=4)},
    "gemma4_vision": _positioned_patches,
    "idefics": _idefics,
    "informer": _series,
    "instructblip": _with_image_tokens(4, qformer_input_ids=lambda: tokens(seed=6)),
    "kosmos-2": _kosmos2,
    "kyutai_speech_to_text": _codebooks,
    "musicgen": _musicgen,
    "muse_glimmer_vision": _patch_rows(384),
    "muse_spark_vision": _patch_rows(384),
    "kimi_k25_vision": _patch_rows(3, 8, 8),
    "gemma3n_audio": _mel_mask,
    "inkling2_vision": _inkling2,
    "muse_spark_audio": lambda config: {"input_values": noise(BATCH, 160)},
    "muse_glimmer_assistant": lambda config: {
        "noise_embeds": noise(BATCH, 4, config.hidden_size),
        "context_hidden_states": noise(BATCH, LENGTH, 2 * config.hidden_size)},
    "granite_speech5_ctc": lambda config: {"input_features": noise(BATCH, 64, 320)},
    "granite_speech5_encoder": lambda config: {"input_features": noise(BATCH, 64, 320)},
    "fun_asr_nano_encoder": lambda config: {
        "input_features": noise(BATCH, 24, config.input_size),
        "input_features_mask": torch.ones(BATCH, 24, dtype=torch.long)},
    "mimi_decoder": lambda config: {"latents": noise(BATCH, config.hidden_size, 12)},
    "canary": lambda config: {**_frames(config), "decoder_input_ids": tokens(seed=4)},
    "parakeet_ctc": _frames,
    "parakeet_encoder": _frames,
    "parakeet_rnnt": lambda config: {**_frames(config), "decoder_input_ids": tokens(seed=4)},
    "parakeet_tdt": lambda config: {**_frames(config), "decoder_input_ids": tokens(seed=4)},
    "nemotron3_5_asr": lambda config: {**_frames(config), "decoder_input_ids": tokens(seed=4)},
    "nemotron_asr_streaming": lambda config: {
        **_frames(config), "decoder_input_ids": tokens(seed=4)},
    "nemotron_asr_streaming_encoder": _frames,
    "nemotron3_5_transcribe_word_timestamp": lambda config: {
        "inputs_embeds": noise(BATCH, LENGTH, config.hidden_size)},
    "musicgen_melody": _musicgen,
    "patchtst": _windows,
    "patchtsmixer": _windows,
    "pe_audio": lambda config: {"input_ids": tokens(), "input_values": noise(BATCH, 1, 4000)},
    "pe_audio_encoder": lambda config: {"input_values": noise(BATCH, 1, 4000)},
    "pix2struct": _flattened,
    "pocket_tts_audio_tokenizer": lambda config: {"input_values": noise(BATCH, 1, 4000)},
    "pocket_tts_audio_tokenizer_encoder": lambda config: {"input_values": noise(BATCH, 1, 4000)},
    "pocket_tts_audio_tokenizer_decoder": lambda config: {
        "latents": noise(BATCH, config.hidden_size, 12)},
    "qwen3_asr_encoder": lambda config: {
        "input_features": noise(BATCH, config.num_mel_bins, 2 * config.n_window),
        "input_features_mask": torch.ones(BATCH, 2 * config.n_window, dtype=torch.long)},
    "instructblipvideo": lambda config: {
        **_with_image_tokens(4)(config), "qformer_input_ids": tokens(seed=6),
        "pixel_values": noise(BATCH, 4, 3, 32, 32)},
    "jev": lambda config: {
        "input_ids": tokens(1), "marks": torch.tensor([[4, 9]]),
        "num_options": torch.tensor([[2, 2]]), "question_type_ids": torch.tensor([[0, 1]])},
    "minicpm_ocr_vision": _sized_patches,
    "minicpmv4_7_vision": _sized_patches,
    "voxtral_realtime_text": lambda config: {
        "input_ids": tokens(), "t_cond": noise(BATCH, 1, config.hidden_size)},
    "videomae": lambda config: {"pixel_values": noise(BATCH, 4, 3, 32, 32)},
    "time_series_transformer": _series,
    "timesfm2_5": lambda config: {"past_values": noise(BATCH, 128)},
    "udop": lambda config: {
        "input_ids": tokens(), "decoder_input_ids": tokens(seed=4),
        "bbox": noise(BATCH, LENGTH, 4).sigmoid()},
    "timesformer": lambda config: {"pixel_values": noise(BATCH, 2, 3, 32, 32)},
    "timesfm": lambda config: {
        "past_values": noise(BATCH, 128), "past_values_padding": torch.zeros(BATCH, 128),
        "freq": torch.zeros(BATCH, 1, dtype=torch.long)},
    "siglip2": lambda config: {"input_ids": tokens(), **_unequal_patches(config)},
    "siglip2_vision_model": _unequal_patches,
    "speech-encoder-decoder": lambda config: {
        "input_values": noise(BATCH, 2000), "decoder_input_ids": tokens(seed=4)},
    "segformer": lambda config: {"pixel_values": noise(BATCH, 3, 128, 128)},
    "speech_to_text": lambda config: {
        "input_features": noise(BATCH, 64, config.input_feat_per_channel),
        "decoder_input_ids": tokens(seed=4)},
    "vivit": lambda config: {"pixel_values": noise(BATCH, 4, 3, 32, 32)},
    "video_llama_3_vision": lambda config: {
        **_patch_rows(3 * config.patch_size**2)(config), "merge_sizes": torch.tensor([1, 1])},
    "wav2vec2-bert": lambda config: {
        "input_features": noise(BATCH, 64, config.feature_projection_input_dim)},
    "xclip": lambda config: {"input_ids": tokens(), "pixel_values": noise(BATCH, 8, 3, 32, 32)},
    "mimi": lambda config: {"input_values": noise(BATCH, 1, 4000)},
    "mimi_encoder": lambda config: {"input_values": noise(BATCH, 1, 4000)},
}  # fmt: skip
