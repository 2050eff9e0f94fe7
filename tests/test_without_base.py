"""Students exported without a copy of their base: what is written, what is refused, and that PyTorch joins them."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from oracles import random_wan_vae
from safetensors.torch import load_file, save_file
from tiny_runs import tiny_model

from rehyat_jax import FeatureMapConfig, HybridConfig, WanConfig
from rehyat_jax.convert import main
from rehyat_jax.generation import hub
from rehyat_jax.models.lora import LORA_TARGETS, LoraConfig, is_adapter, merged, split_tree
from rehyat_jax.pytorch import rehyat_torch
from rehyat_jax.weights import save_model
from rehyat_jax.weights.adapters import save_adapters

FORM = HybridConfig(chunk_frames=2, feature_map=FeatureMapConfig(features=8), decay=True)
STUDENT = WanConfig(
    num_heads=2, head_dim=12, ffn_dim=32, num_layers=3, text_dim=24, text_length=8, hybrid_blocks=(0, 2), hybrid=FORM
)
SOFTMAX = STUDENT.replace(hybrid_blocks=())
LORA = LoraConfig(rank=2, alpha=3.0, targets=LORA_TARGETS)
NAMES = dict(codec="wan_vae", text_encoder="umt5")
BRANCH, ADAPTER = "rehyat_branch.safetensors", "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of model checkpoints and exports, not to be changed.

    `base`; two students of it, `student` and `adapted`, the latter with merged adapters, which `adapter` has;
    `pipeline`, diffusers' folder of the base with a VAE; `branch` and `adapted_branch`, the exports without base.
    """
    folder = tmp_path_factory.mktemp("models")
    _, params = tiny_model(STUDENT, lora=LORA)
    adapters, student = split_tree(params, is_adapter)
    base = {name: tree for name, tree in student.items() if name != "feature_maps"}
    save_model(folder / "base", SOFTMAX, base, **NAMES)
    save_model(folder / "student", STUDENT, student, **NAMES)
    save_model(folder / "adapted", STUDENT, merged(params, LORA), **NAMES)
    save_adapters(folder / "adapter", STUDENT, adapters, LORA)

    assert export(folder / "base", folder / "base_torch") == 0
    transformer = rehyat_torch.WanTransformer3DModel.from_pretrained(folder / "base_torch")
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = WanPipeline(None, None, random_wan_vae(), scheduler, transformer=transformer)
    pipeline.save_pretrained(folder / "pipeline")

    without_base = ["--without-base", folder / "pipeline"]
    assert export(folder / "student", folder / "branch", *without_base) == 0
    assert export(folder / "adapted", folder / "adapted_branch", *without_base, "--adapter", folder / "adapter") == 0
    return folder


def export(model, folder, *options):
    return main([str(argument) for argument in ("to-torch", model, folder, "--layout", "diffusers", *options)])


def refusal(capsys, *arguments):
    capsys.readouterr()
    assert export(*arguments) == 2
    return capsys.readouterr().err


@pytest.fixture
def branch(models, tmp_path):
    """A student without its base that a test may change."""
    return shutil.copytree(models / "adapted_branch", tmp_path / "branch")


def frames(pipeline, transformer):
    """[frames, height, width, 3] in [0, 1] of a pipeline with this transformer."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: torch.tensor(rng.standard_normal(shape, np.float32))
    latents, text = draw(1, 16, 4, 4, 6), draw(2, 1, 8, 24)
    pipeline = WanPipeline.from_pretrained(pipeline, transformer=transformer, tokenizer=None, text_encoder=None)
    pipeline.set_progress_bar_config(disable=True)
    prompts = dict(prompt_embeds=text[0], negative_prompt_embeds=text[1], guidance_scale=2.0)
    size = dict(height=32, width=48, num_frames=13, num_inference_steps=2)
    return pipeline(**prompts, **size, latents=latents, output_type="np").frames[0]


@pytest.mark.parametrize("name", ["student", "adapted"])
def test_frames_are_those_of_the_complete_export(models, tmp_path, name):
    assert export(models / name, tmp_path / "complete") == 0
    expected = frames(models / "pipeline", rehyat_torch.load_student(tmp_path / "complete"))
    folder = models / {"student": "branch", "adapted": "adapted_branch"}[name]
    found = frames(models / "pipeline", rehyat_torch.load_student(folder, base=models / "pipeline"))
    # The base's weights are the same bits; adapters are added in float32 by another library.
    assert np.abs(found - expected).max() <= (0 if name == "student" else 1e-4)
    base = rehyat_torch.WanTransformer3DModel.from_pretrained(models / "base_torch")
    assert np.abs(found - frames(models / "pipeline", base)).max() > 0.01


def test_the_folder_has_what_the_base_lacks(models):
    names = lambda folder: {file.name for file in folder.iterdir()}
    expected = {".written_by_rehyat_jax", "README.md", "config.json", "rehyat.json", "rehyat_torch.py", BRANCH}
    assert names(models / "branch") == expected
    assert names(models / "adapted_branch") == expected | {ADAPTER}
    complete = rehyat_torch.load_student(models / "branch", base=models / "base_torch").state_dict()
    of_base = load_file(models / "base_torch" / "diffusion_pytorch_model.safetensors")
    branch = load_file(models / "branch" / BRANCH)
    assert branch.keys() == complete.keys() - of_base.keys()
    assert {name.split(".")[1] for name in branch} == {"0", "2"}
    assert json.loads((models / "branch" / "rehyat.json").read_text())["base"]["name"] is None


def test_a_bfloat16_copy_of_the_base_is_the_same_base(models, tmp_path):
    copied = shutil.copytree(models / "base_torch", tmp_path / "base")
    weights = copied / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights)
    found = rehyat_torch.load_student(models / "branch", torch.bfloat16, base=copied).state_dict()
    expected = rehyat_torch.load_student(models / "branch", torch.bfloat16, base=models / "base_torch").state_dict()
    name = "blocks.0.ffn.net.0.proj.weight"
    assert found[name].dtype == torch.bfloat16 and torch.equal(found[name], expected[name])


def test_a_saved_student_has_its_base(models, tmp_path):
    student = rehyat_torch.load_student(models / "adapted_branch", base=models / "pipeline")
    rehyat_torch.save_student(student, tmp_path / "saved")
    assert main(["from-torch", str(tmp_path / "saved"), str(tmp_path / "back")]) == 0
    saved = rehyat_torch.load_student(tmp_path / "saved").state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in student.state_dict().items())


def test_a_base_on_the_hub_is_found_by_its_name(models, tmp_path, monkeypatch):
    asked = []

    def download(repository, *, revision, allow_patterns):
        asked.append((repository, revision))
        return str(models / "pipeline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert export(models / "student", tmp_path / "branch", "--without-base", "owner/wan@v2") == 0
    assert "base_model: owner/wan\n" in (tmp_path / "branch" / "README.md").read_text()
    rehyat_torch.load_student(tmp_path / "branch")
    rehyat_torch.load_student(models / "branch", base="owner/other")
    assert asked == [("owner/wan", "v2"), ("owner/wan", "v2"), ("owner/other", None)]
    assert not any(pattern.startswith("vae") for pattern in hub.TRANSFORMER_FILES)


def test_a_base_that_cannot_be_fetched_is_named(models, monkeypatch):
    def download(repository, **options):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=r"owner/wan: is no folder here.*\(no network\)"):
        rehyat_torch.load_student(models / "branch", base="owner/wan")


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_finetuned_student_is_refused(models, tmp_path, capsys):
    params = jax.tree.map(np.array, split_tree(tiny_model(STUDENT, lora=LORA)[1], is_adapter)[1])
    params["blocks"]["self_attention"]["query"]["kernel"][1, 0, 0] += 1e-6
    params["head"]["projection"]["bias"] += 1
    save_model(tmp_path / "tuned", STUDENT, params, **NAMES)
    message = refusal(capsys, tmp_path / "tuned", tmp_path / "out", "--without-base", models / "base")
    count = len(rehyat_torch.WanTransformer3DModel.from_pretrained(models / "base_torch").state_dict())
    assert f"2 of the {count} tensors" in message and "blocks.1.attn1.to_q.weight, proj_out.bias;" in message
    assert "without --without-base" in message and not (tmp_path / "out").exists()


def test_a_student_with_adapters_needs_them(models, tmp_path, capsys):
    arguments = models / "adapted", tmp_path / "out", "--without-base", models / "base"
    message = refusal(capsys, *arguments)
    # Ten layers of three blocks.
    assert f"{models / 'adapter'} if they are this student's" in message and "30 of the " in message
    tensors = load_file(models / "adapter" / ADAPTER)
    a, b = (f"transformer.blocks.1.attn1.to_q.lora_{side}.weight" for side in "AB")
    for change, words in (
        (lambda t: t[a].mul_(1.001), "1 of the "),
        (lambda t: t.pop(b), f"tensor {a} is not one of a pair"),
        (lambda t: t.update({b: t[b][:, :1].clone()}), "should have shapes [rank, 24] and [24, rank]"),
        (lambda t: t.update({"other.weight": t[a].clone()}), "tensor other.weight is not one"),
    ):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        change(changed)
        save_file(changed, tmp_path / "changed.safetensors")
        assert words in refusal(capsys, *arguments, "--adapter", tmp_path / "changed.safetensors")


def test_another_model_is_no_base(models, tmp_path, capsys):
    out, option = tmp_path / "out", "--without-base"
    larger = SOFTMAX.replace(ffn_dim=48)
    save_model(tmp_path / "larger", larger, tiny_model(larger)[1], **NAMES)
    assert "ffn_dim should be 32" in refusal(capsys, models / "student", out, option, tmp_path / "larger")
    assert "found a student" in refusal(capsys, models / "student", out, option, models / "student")
    assert "no hybrid blocks" in refusal(capsys, models / "base", out, option, models / "base")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--adapter", "adapter"], "--adapter"),
        (["--base-name", "no name"], "--base-name"),
        (["--license", "my own\udcff"], "--license"),
        (["--layout", "original", "--without-base", "base"], "--layout"),
        (["--layout", "original", "--base-name", "owner/wan"], "--layout"),
        (["--without-base", "./nowhere"], "nowhere: does not exist"),
    ],
)
def test_options_that_contradict_are_refused(models, tmp_path, capsys, options, words):
    assert f"error: {words}" in refusal(capsys, models / "student", tmp_path / "out", *options)


def test_a_student_without_its_base_is_not_converted_back(models, tmp_path, capsys):
    assert main(["from-torch", str(models / "branch"), str(tmp_path / "back")]) == 2
    assert "is a student without a copy of its base" in capsys.readouterr().err


def edit(file, change):
    def damage(folder):
        if file.endswith("json"):
            content = json.loads((folder / file).read_text())
            change(content)
            (folder / file).write_text(json.dumps(content))
        else:
            tensors = load_file(folder / file)
            change(tensors)
            save_file(tensors, folder / file)

    return damage


SCALE = "blocks.2.attn1.feature_map_key.log_scale"
BIAS = "proj_out.bias"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (edit(BRANCH, lambda t: t.pop(SCALE)), ValueError, rf"missing: \['{SCALE}'\]"),
        (edit(BRANCH, lambda t: t.update(other=torch.zeros(1))), ValueError, r"unexpected: \['other'\]"),
        (edit(BRANCH, lambda t: t.update({BIAS: torch.zeros(64)})), ValueError, rf"of the base.*\['{BIAS}'\]"),
        (edit(ADAPTER, lambda t: t.pop(next(iter(t)))), ValueError, "expected pairs"),
        (lambda folder: (folder / ADAPTER).unlink(), FileNotFoundError, ADAPTER),
        (lambda folder: (folder / BRANCH).unlink(), FileNotFoundError, BRANCH),
        (
            edit("rehyat.json", lambda form: form["base"].update(hash="0")),
            ValueError,
            "base should have name, identity",
        ),
        (edit("rehyat.json", lambda form: form.update(base=3)), ValueError, "base should have name.*found 3"),
        (edit("rehyat.json", lambda form: form.pop("base")), ValueError, "leave base out"),
    ],
    ids=[
        "missing",
        "unknown",
        "twice",
        "half_adapter",
        "no_adapter",
        "no_branch",
        "unknown_field",
        "number",
        "no_base",
    ],
)
def test_the_loader_names_what_is_wrong(models, branch, damage, error, message):
    damage(branch)
    with pytest.raises(error, match=message):
        rehyat_torch.load_student(branch, base=models / "pipeline")


def test_the_loader_refuses_adapters_of_other_layers(models, branch):
    tensors = load_file(branch / ADAPTER)
    pair = {f"transformer.blocks.9.lora_{side}.weight": torch.zeros(1, 1) for side in "AB"}
    save_file(tensors | pair, branch / ADAPTER)
    with pytest.raises(ValueError, match=r"unexpected: \['blocks.9.weight'\]"):
        rehyat_torch.load_student(branch, base=models / "pipeline")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit("config.json", lambda config: config.update(eps=1e-5)), "eps should be 1e-06, found 1e-05"),
        (
            edit("diffusion_pytorch_model.safetensors", lambda t: t["blocks.1.ffn.net.2.weight"].mul_(1.01)),
            "its weights are others",
        ),
    ],
    ids=["architecture", "weights"],
)
def test_the_loader_refuses_another_base(models, tmp_path, damage, message):
    base = shutil.copytree(models / "base_torch", tmp_path / "base")
    damage(base)
    with pytest.raises(
        ValueError, match=f"{base}: is not the base of .*{message}.*the model that the student was made"
    ):
        rehyat_torch.load_student(models / "branch", base=base)


def test_the_loader_asks_for_a_base_without_a_name(models):
    with pytest.raises(ValueError, match="does not name it; give base="):
        rehyat_torch.load_student(models / "branch")
    with pytest.raises(FileNotFoundError, match=r"\./nowhere: does not exist"):
        rehyat_torch.load_student(models / "branch", base="./nowhere")


def test_an_edited_card_is_not_replaced(models, tmp_path, capsys):
    arguments = models / "student", tmp_path / "branch", "--without-base", models / "base"
    assert export(*arguments) == 0
    assert export(*arguments, "--force") == 0
    with open(tmp_path / "branch" / "README.md", "a") as card:
        card.write("My words.\n")
    assert "convert did not write README.md" in refusal(capsys, *arguments, "--force")
