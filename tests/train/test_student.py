"""The student over time: banks, causality, gradients."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    BertTokenizerFast,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
)

from stages.train.noise import Site
from stages.train.qformer import Attention
from stages.train.student import Student, build, load_instructblip, load_trained, num_aligned_frames, read_instructblip

PROMPTS = ["what is the relationship of the movie ?", "who runs ?"]  # different lengths: the second is padded
ALL = tuple(range(1, 6))

MakeStudent = Callable[..., Student]
MakeFeatures = Callable[..., torch.Tensor]


def naive(student: Student, f: torch.Tensor, prompts: list[str]) -> list[list[torch.Tensor]]:
    """The recurrence with plain lists for one sample at a time and no code of memory.py: hidden[t][level] for B = 1."""

    def compress(entries: list[torch.Tensor], sizes: list[list[int]]) -> tuple[list[torch.Tensor], list[list[int]]]:
        stacked = torch.stack(entries)  # [K + 1, N, C]
        columns, counts = [], []
        for n in range(stacked.shape[1]):
            column, count = list(stacked[:, n]), [size[n] for size in sizes]
            cosine = [float(F.cosine_similarity(a, b, dim=0)) for a, b in itertools.pairwise(column)]
            j = cosine.index(max(cosine))
            merged = (count[j] * column[j] + count[j + 1] * column[j + 1]) / (count[j] + count[j + 1])
            column[j : j + 2], count[j : j + 2] = [merged], [count[j] + count[j + 1]]
            columns.append(torch.stack(column))
            counts.append(count)
        return list(torch.stack(columns, 1)), [list(row) for row in zip(*counts, strict=True)]

    def attend(
        part: Attention, states: torch.Tensor, source: list[torch.Tensor], keys: torch.Tensor | None
    ) -> torch.Tensor:
        mixed = part.attention(states[None], (torch.cat(source)[None],), keys)
        return part.output(mixed, states[None], None, Site.SELF_OUTPUT)[0]

    ids, keep = student.tokenize(prompts)
    qformer, limit, num_queries = student.qformer, student.cfg.memory_len, student.cfg.num_queries
    visual: list[torch.Tensor] = []
    visual_sizes: list[list[int]] = []
    layers: list[list[torch.Tensor]] = [[] for _ in qformer.layers]
    layer_sizes: list[list[list[int]]] = [[] for _ in layers]
    out = []
    for t in range(f.shape[1]):
        f_t = student.ln_vision(f[0, t]) + student.image_pe.weight[t]
        states = qformer.embeddings(student.query_tokens, ids)[0]  # [N, E]
        mask = torch.cat([torch.ones(num_queries, dtype=torch.bool), keep[0]])
        hidden = [states]
        for i, layer in enumerate(qformer.layers):
            entry = states.detach()
            attended = attend(layer.attention, states, [*layers[i], states], mask.repeat(len(layers[i]) + 1)[None])
            queries, text = attended[:num_queries], attended[num_queries:]
            if layer.crossattention is not None:
                queries = attend(layer.crossattention, queries, [*visual, f_t], None)
            states = layer.feed_forward(queries[None, None], text[None, None], None)[0, 0]
            layers[i].append(entry)
            layer_sizes[i].append([1] * len(entry))
            if len(layers[i]) > limit:
                layers[i], layer_sizes[i] = compress(layers[i], layer_sizes[i])
            hidden.append(states)
        visual.append(f_t.detach())
        visual_sizes.append([1] * len(f_t))
        if len(visual) > limit:
            visual, visual_sizes = compress(visual, visual_sizes)
        out.append(hidden)
    return out


@pytest.mark.parametrize("evaluation", ["reference", "lean", "parallel"])
@pytest.mark.parametrize("num_frames", [1, 3, 4, 5, 9])  # K = 3: T below, at, one above, and far above K
def test_the_student_equals_the_recurrence_written_with_lists(
    make_student: MakeStudent, features: MakeFeatures, num_frames: int, evaluation: str
) -> None:
    student, f = make_student(evaluation=evaluation), features(2, num_frames)
    out = student(f, PROMPTS, levels=ALL, frames="all")
    for b in range(2):
        want = naive(student, f[b : b + 1], [PROMPTS[b]])
        for t in range(num_frames):
            for u in ALL:
                torch.testing.assert_close(out.hidden[u][b, t], want[t][u - 1][:5], rtol=0, atol=1e-12)
        torch.testing.assert_close(out.prefix[b], student.llm_proj(want[-1][-1][:5]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("evaluation", ["reference", "lean", "parallel"])
def test_query_states_that_are_nearly_alike_merge_by_their_true_cosines(
    make_student: MakeStudent, features: MakeFeatures, evaluation: str
) -> None:
    """Frames that differ in their fourth digit: cosines of query states then differ far behind the sixth decimal."""
    student = make_student(evaluation=evaluation, num_layers=6)
    f = features(1, 1) + 1e-3 * features(1, 12, seed=1)
    out, want = student(f, PROMPTS[:1], levels=range(1, 8), frames="all"), naive(student, f, PROMPTS[:1])
    for t, u in itertools.product(range(12), range(1, 8)):
        torch.testing.assert_close(out.hidden[u][0, t], want[t][u - 1][:5], rtol=0, atol=1e-12)


def test_output_at_t_is_blind_to_later_frames_and_sees_all_earlier_ones(
    make_student: MakeStudent, features: MakeFeatures
) -> None:
    student, f = make_student(), features(1, 8)
    base = student(f, PROMPTS[:1], levels=(5,), frames="all").hidden[5]
    for changed in range(8):
        g = f.clone()
        g[:, changed] = features(1, 1, seed=7)[:, 0]
        other = student(g, PROMPTS[:1], levels=(5,), frames="all").hidden[5]
        moved = [(base[:, t] - other[:, t]).abs().max().item() > 1e-9 for t in range(8)]
        assert moved == [t >= changed for t in range(8)]


def test_no_state_outlives_a_call(make_student: MakeStudent, features: MakeFeatures) -> None:
    student = make_student()
    first = student(features(2, 7), PROMPTS).prefix
    student(features(2, 4, seed=1), PROMPTS)  # other length, other content
    with pytest.raises(ValueError, match="max_frames"):
        student(features(2, 17), PROMPTS)
    assert torch.equal(student(features(2, 7), PROMPTS).prefix, first)


def test_the_language_loss_trains_everything_but_the_past(make_student: MakeStudent, features: MakeFeatures) -> None:
    student = make_student()
    student(features(2, 6), PROMPTS).prefix.square().sum().backward()
    # The text's feed-forward of the last block and levels nobody reads get no gradient; the rest does, by name.
    silent = {name for name, p in student.named_parameters() if p.grad is None or p.grad.abs().sum() == 0}
    last_text = {
        f"qformer.encoder.layer.3.{part}" for part in ("intermediate.dense", "output.dense", "output.LayerNorm")
    }
    assert {name.rsplit(".", 1)[0] for name in silent} == last_text
    pe = student.image_pe.weight.grad
    assert pe is not None
    assert [bool(row.abs().sum() > 0) for row in pe[:6]] == [False] * 5 + [True]


def test_alignment_of_all_frames_trains_pe_of_all_frames(make_student: MakeStudent, features: MakeFeatures) -> None:
    student = make_student()
    student(features(2, 6), PROMPTS, levels=(3,), frames="all").hidden[3].square().sum().backward()
    pe = student.image_pe.weight.grad
    assert pe is not None
    assert [bool(row.abs().sum() > 0) for row in pe] == [True] * 6 + [False] * 10


@pytest.mark.parametrize("frames", ["last", 2, 4])
def test_aligning_some_frames_equals_slicing_all(
    make_student: MakeStudent, features: MakeFeatures, frames: str | int
) -> None:
    student, f = make_student(), features(2, 6)
    count = num_aligned_frames(frames, 6)  # type: ignore[arg-type]
    gradients = []
    for chosen in (frames, "all"):
        student.zero_grad()
        hidden = student(f, PROMPTS, levels=(4,), frames=chosen).hidden[4][:, -count:]
        hidden.square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
        values = hidden.detach()
    assert hidden.shape == (2, count, 5, 12)
    torch.testing.assert_close(values, student(f, PROMPTS, levels=(4,), frames=frames).hidden[4], rtol=0, atol=1e-12)
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0].get(name, torch.zeros_like(gradient)), gradient, rtol=0, atol=1e-9)


def test_frozen_parts_stay_frozen(make_student: MakeStudent, features: MakeFeatures) -> None:
    student = make_student(pe="frozen_zero", train_ln_vision=False)
    student(features(1, 3), PROMPTS[:1]).prefix.sum().backward()
    assert student.image_pe.weight.grad is None
    assert student.ln_vision.weight.grad is None


def test_an_unknown_level_is_refused(make_student: MakeStudent, features: MakeFeatures) -> None:
    with pytest.raises(ValueError, match="levels 1 to 5"):
        make_student()(features(1, 2), PROMPTS[:1], levels=(6,))


@pytest.fixture
def instructblip_folder(tmp_path: Path, bert_folder: Path) -> Path:
    """A small clone of the hub's InstructBLIP layout: sharded safetensors, index, qformer_tokenizer/."""
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(
            hidden_size=10,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=15,
            hidden_size=12,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=20,
            encoder_hidden_size=10,
        ),
        text_config=LlamaConfig(
            vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
        ),
        num_query_tokens=5,
    )
    torch.manual_seed(2)
    model = InstructBlipForConditionalGeneration(config)
    model.query_tokens.data.normal_()
    folder = tmp_path / "instructblip"
    model.save_pretrained(folder, max_shard_size="20KB")
    BertTokenizerFast.from_pretrained(bert_folder).save_pretrained(folder / "qformer_tokenizer")
    return folder


def test_an_instructblip_checkpoint_loads_whole(make_student: MakeStudent, instructblip_folder: Path) -> None:
    cfg = make_student().cfg.model_copy(update={"init": str(instructblip_folder), "tokenizer": ""})
    student = build(cfg, clip_width=10, llm_width=8)
    model = InstructBlipForConditionalGeneration.from_pretrained(instructblip_folder)
    theirs = {k: v for k, v in model.state_dict().items() if "position_ids" not in k}
    inner = {k.removeprefix("model."): v for k, v in theirs.items()}
    assert torch.equal(student.query_tokens, inner["query_tokens"])
    assert torch.equal(student.llm_proj.weight, inner["language_projection.weight"])
    assert torch.equal(student.ln_vision.bias, inner["vision_model.post_layernorm.bias"])
    key = "encoder.layer.2.crossattention.attention.key.weight"
    assert torch.equal(student.qformer.state_dict()[key], inner[f"qformer.{key}"])
    assert torch.count_nonzero(student.image_pe.weight) == 0


def test_another_clip_or_llm_width_is_said_aloud(make_student: MakeStudent, instructblip_folder: Path) -> None:
    cfg = make_student().cfg.model_copy(update={"init": str(instructblip_folder), "tokenizer": ""})
    with pytest.warns(UserWarning, match="crossattention.attention.key"):
        build(cfg, clip_width=14, llm_width=8)
    with pytest.warns(UserWarning, match="llm_proj"):
        build(cfg, clip_width=10, llm_width=9)


def test_a_checkpoint_of_another_shape_is_refused(make_student: MakeStudent, instructblip_folder: Path) -> None:
    cfg = make_student().cfg.model_copy(update={"init": str(instructblip_folder), "tokenizer": "", "num_queries": 6})
    with pytest.raises(ValueError, match=r"query_tokens(?s:.*):  --set student\.num_queries=5$"):
        build(cfg, clip_width=10, llm_width=8)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_queries": 6, "num_layers": 3, "intermediate_size": 24},
        {"hidden_size": 15, "num_layers": 6, "cross_attention_every": 3},
    ],
)
def test_the_settings_that_a_refused_checkpoint_names_are_those_that_fit(
    make_student: MakeStudent, instructblip_folder: Path, settings: dict[str, int]
) -> None:
    cfg = make_student().cfg.model_copy(update={"init": str(instructblip_folder), "tokenizer": "", **settings})
    with pytest.raises(ValueError, match="Take the sizes of the checkpoint") as caught:
        build(cfg, clip_width=10, llm_width=8)
    fitting = dict(re.findall(r"--set student\.(\w+)=(\d+)", str(caught.value)))
    build(cfg.model_copy(update={key: int(value) for key, value in fitting.items()}), clip_width=10, llm_width=8)


def one_row_more(folder: Path, target: Path, rows: int = 1) -> Path:
    shutil.copytree(folder, target)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        for key in tensors:
            if key.endswith("word_embeddings.weight") and "qformer" in key:
                tensors[key] = torch.cat([tensors[key], torch.ones(rows, 12)])
        save_file(tensors, file, metadata={"format": "pt"})
    return target


def test_a_checkpoint_with_one_word_more_names_its_own_tokenizer(
    make_student: MakeStudent, instructblip_folder: Path, bert_folder: Path, tmp_path: Path
) -> None:
    folder = one_row_more(instructblip_folder, tmp_path / "one-more")
    tokenizer = BertTokenizerFast.from_pretrained(bert_folder)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.save_pretrained(folder / "qformer_tokenizer")
    cfg = make_student().cfg.model_copy(update={"init": str(folder), "tokenizer": str(bert_folder)})
    with pytest.raises(ValueError, match=r"1 token more \(\[DEC\]\?\)(?s:.*)  --set student\.tokenizer=$"):
        build(cfg, clip_width=10, llm_width=8)
    student = build(cfg.model_copy(update={"tokenizer": ""}), clip_width=10, llm_width=8)
    assert student.qformer.embeddings.word_embeddings.num_embeddings == 16


def test_the_word_that_ma_lmm_adds_to_bert_is_added_here_too(
    make_student: MakeStudent, instructblip_folder: Path, bert_folder: Path, tmp_path: Path
) -> None:
    folder = one_row_more(instructblip_folder, tmp_path / "released", rows=30_523 - 15)
    words = BertTokenizerFast.from_pretrained(bert_folder).get_vocab()
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join([*sorted(words, key=words.__getitem__), *(f"w{n}" for n in range(30_522 - 15))]) + "\n")
    BertTokenizerFast(vocab=str(vocab)).save_pretrained(tmp_path / "bert")
    settings = {"init": str(folder), "tokenizer": str(tmp_path / "bert")}
    student = build(make_student().cfg.model_copy(update=settings), clip_width=10, llm_width=8)
    assert student.tokenizer.bos_token_id == 30_522
    plain = BertTokenizerFast.from_pretrained(tmp_path / "bert")
    assert student.tokenize(["what is the scene"])[0].tolist() == [plain("what is the scene").input_ids]


def test_a_trained_student_of_other_sizes_names_the_settings_it_was_trained_with(make_student: MakeStudent) -> None:
    trained = make_student(num_queries=7, max_frames=20).state_dict()
    with pytest.raises(ValueError, match=r"query_tokens is \(1, 7, 12\)") as caught:
        load_trained(make_student(), trained, source="step-3")
    assert str(caught.value).endswith(":  --set student.num_queries=7 --set student.max_frames=20")


def test_a_checkpoint_with_a_missing_tensor_is_refused(make_student: MakeStudent, tmp_path: Path) -> None:
    student = make_student(dtype=torch.float32)
    save_file({"query_tokens": torch.zeros(1, 5, 12)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no tensor"):
        load_instructblip(student, read_instructblip(tmp_path), source=tmp_path)
