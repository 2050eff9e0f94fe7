"""Model cards and the check before an upload: what a card says, and what is refused."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_runs import digits_config, tiny_model

from rehyat_jax import FeatureMapConfig, HybridConfig, WanConfig
from rehyat_jax.convert import main
from rehyat_jax.diffusion.solver_options import SolverOptions
from rehyat_jax.evaluation.bootstrap import Estimate
from rehyat_jax.evaluation.results import Evaluation
from rehyat_jax.files.fingerprint import BLOCKS, fingerprint
from rehyat_jax.training.config import save_config
from rehyat_jax.weights import save_model
from rehyat_jax.weights.load import checkpoint_files

FORM = HybridConfig(chunk_frames=2, feature_map=FeatureMapConfig(features=8))
STUDENT = WanConfig(num_heads=2, head_dim=12, ffn_dim=32, num_layers=3, text_dim=24, hybrid_blocks=(0, 2), hybrid=FORM)
NAMES = dict(codec="wan_vae", text_encoder="umt5")
WEIGHTS, BRANCH = "diffusion_pytorch_model.safetensors", "rehyat_branch.safetensors"


def export(model, folder, *options):
    return main([str(argument) for argument in ("to-torch", model, folder, "--layout", "diffusers", *options)])


def save_run(workdir, config, student, params, **options):
    """The records of a training run and its result."""
    workdir.mkdir(parents=True)
    save_config(config, workdir)
    (workdir / "metrics.jsonl").touch()
    save_model(workdir / "model", student, params, **NAMES, **options)


def evaluation_of(model, file):
    """An evaluation.json of a model checkpoint."""
    folder, files = checkpoint_files(model)
    found = Evaluation()
    found.about = {
        "models": {"student": {"fingerprint": fingerprint(files, folder, blocks=BLOCKS)}},
        "options": {"samples": 40},
        "data": {"examples": 64, "kind": "examples", "latents_shape": [21, 6, 6, 16]},
        "versions": {"rehyat_jax": "0.1"},
        "device": "cpu (x86_64)",
    }
    estimate = Estimate(np.array(0.25), np.array(0.125), np.array(0.5))
    found.metrics = {"velocity_error": estimate, "sharpness_student": estimate}
    file.write_text(json.dumps(found.to_json()))
    return file


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Runs in `distill` and `finetune`, and the result of the latter in `complete`, `branch`; not to be changed."""
    folder = tmp_path_factory.mktemp("exports")
    _, params = tiny_model(STUDENT)
    distill = digits_config(folder, "distill", steps=7, **{"init_from": str(folder / "private" / "base")})
    finetune = digits_config(folder, "finetune", steps=9, **{"init_from": str(folder / "distill" / "model")})
    finetune.data.source, finetune.data.path = "prepared", str(folder / "private" / "clips")
    save_run(folder / "distill", distill, STUDENT, params)
    save_run(folder / "finetune", finetune, STUDENT, params)
    base = {name: tree for name, tree in params.items() if name != "feature_maps"}
    save_model(folder / "base", STUDENT.replace(hybrid_blocks=()), base, **NAMES)
    model, named = folder / "finetune" / "model", ("--base-name", "owner/wan")
    evaluation = evaluation_of(model, folder / "evaluation.json")
    assert export(model, folder / "complete", *named, "--evaluation", evaluation) == 0
    assert export(model, folder / "branch", *named, "--without-base", folder / "base") == 0
    return folder


@pytest.fixture(params=["complete", "branch"])
def either(exports, tmp_path, request):
    """An export of either kind, to be changed."""
    return shutil.copytree(exports / request.param, tmp_path / "export")


# ---------------------------------------------------------------------------------------------------------------- cards


def test_the_card_says_where_a_student_comes_from(exports):
    card = ModelCard.load(exports / "complete" / "README.md")
    expected = {"license": "apache-2.0", "base_model": "owner/wan", "library_name": "diffusers"}
    assert {name: card.data.get(name) for name in expected} == expected
    assert card.data.pipeline_tag == "text-to-video"
    rows = [line.split(" | ")[:3] for line in card.text.splitlines() if line.startswith(("| distill", "| finetune"))]
    assert rows == [["| distill", "7", "4"], ["| finetune", "9", "4"]]
    assert "started from `private/base`" in card.text and "| clips |" in card.text
    assert str(exports) not in card.text, "a path of this machine"
    assert "0.250 (0.125 to 0.500)" in card.text and "40 samples of each model" in card.text
    assert "2 x hybrid 2+1" in card.text and "1 x softmax" in card.text


def test_the_code_in_the_cards_loads_the_models(exports, tmp_path, monkeypatch):
    assert export(exports / "base", tmp_path / "base") == 0
    monkeypatch.syspath_prepend("")  # so that the code's own change is undone
    for folder, loader in ((exports / "branch", 'base="owner/wan"'), (tmp_path / "base", "from_pretrained(folder")):
        code = (folder / "README.md").read_text().split("```python\n")[1].split("pipeline =")[0]
        assert loader in code
        monkeypatch.chdir(folder)
        found = {}
        exec(code.replace("owner/wan", str(tmp_path / "base")), found)
        assert found["transformer"].dtype == torch.bfloat16


def test_limits_name_what_was_not_measured(exports, tmp_path):
    assert "quality was not measured" in (exports / "branch" / "README.md").read_text()
    assert "not measured" not in (exports / "complete" / "README.md").read_text()
    solver = SolverOptions(steps=4, guidance_scale=1.0, flow_shift=5.0, sampler="renoise")
    names = dict(codec="space_to_depth", text_encoder="word_vectors")
    save_model(tmp_path / "few", STUDENT, tiny_model(STUDENT)[1], **names, noise_by_chunk=True, sampling=solver)
    assert export(tmp_path / "few", tmp_path / "out") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "trained for 4 steps" in text and "its own noise level" in text
    assert "space_to_depth" in text and "WanPipeline.from_pretrained" not in text
    assert "without records of its training" in text and "base_model" not in text


def test_the_evaluation_of_another_model_is_refused(exports, tmp_path, capsys):
    evaluation = evaluation_of(exports / "distill" / "model", tmp_path / "other.json")
    arguments = exports / "base", tmp_path / "out", "--evaluation"
    assert export(*arguments, evaluation) == 2
    assert "is the evaluation of another student" in capsys.readouterr().err
    for content, words in (
        ({}, "expected the evaluation.json"),
        (json.loads(evaluation.read_text()) | {"metrics": {"velocity_error": 3}}, "metrics.velocity_error"),
    ):
        (tmp_path / "broken.json").write_text(json.dumps(content))
        assert export(*arguments, tmp_path / "broken.json") == 2
        assert words in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- publish


def test_a_good_folder_is_listed_with_its_upload_command(exports, either, capsys):
    (either / "sample.mp4").write_bytes(b"\0\0\0\x20ftypisom")
    (either / ".cache" / "huggingface").mkdir(parents=True)
    (either / ".cache" / "huggingface" / "upload.bin").touch()  # hf leaves it out
    capsys.readouterr()
    assert main(["publish", str(either), "--repo", "me/student"]) == 0
    printed = capsys.readouterr().out
    listed = {line.split()[-1] for line in printed.splitlines() if " MB  " in line}
    assert listed == {file.name for file in either.iterdir()} - {".written_by_rehyat_jax", ".cache"}
    assert printed.splitlines()[-1] == f"  hf upload me/student {either} . --exclude .written_by_rehyat_jax"


def edit_card(before, after):
    def damage(folder):
        text = (folder / "README.md").read_text()
        assert before in text
        (folder / "README.md").write_text(text.replace(before, after))

    return damage


def edit_tensors(change):
    def damage(folder):
        file = folder / (BRANCH if (folder / BRANCH).exists() else WEIGHTS)
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def hidden_pickle(folder):
    folder.mkdir()
    (folder / "old.pt").touch()


SCALE = "blocks.2.attn1.feature_map_key.log_scale"

DAMAGES = {
    "pickle": (lambda f: (f / "notes.bin").touch(), "notes.bin: is a pickle"),
    "pickle_by_content": (lambda f: (f / "notes.txt").write_bytes(pickle.dumps([1])), "notes.txt: is a pickle"),
    "pickle_in_a_folder": (lambda f: hidden_pickle(f / ".cache"), "old.pt: is a pickle"),
    "linked_folder": (lambda f: (f / "more").symlink_to(f), "more: is a link to a folder"),
    "no_card": (lambda f: (f / "README.md").unlink(), "README.md: is missing"),
    "no_loader": (lambda f: (f / "rehyat_torch.py").unlink(), "rehyat_torch.py: is missing"),
    "no_config": (lambda f: (f / "config.json").unlink(), "config.json: is missing"),
    "no_front_matter": (edit_card("---\n", ""), "library_name should be 'diffusers', found 'None'"),
    "not_yaml": (edit_card("license: apache-2.0", "license: {"), "front matter cannot be read"),
    "no_license": (edit_card("license: apache-2.0\n", ""), "license is missing"),
    "no_base": (edit_card("base_model: owner/wan\n", ""), "base_model should be the base's name"),
    "other_library": (edit_card("library_name: diffusers", "library_name: timm"), "found 'timm'"),
    "missing_tensor": (edit_tensors(lambda t: t.pop(SCALE)), f"tensor {SCALE} is missing"),
    "unknown_tensor": (edit_tensors(lambda t: t.update(other=torch.zeros(1))), "tensor other is "),
    "shape": (edit_tensors(lambda t: t.update({SCALE: torch.zeros(3)})), f"tensor {SCALE} should have shape [2]"),
    "nan": (edit_tensors(lambda t: t[SCALE].fill_(float("nan"))), "NaN or infinite"),
    "truncated": (
        lambda f: [file.write_bytes(file.read_bytes()[:-4]) for file in f.glob("*.safetensors")],
        "it is truncated",
    ),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused(either, capsys, damage, words):
    damage(either)
    assert main(["publish", str(either), "--repo", "me/student"]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and "hf upload" not in printed.out


def edit_form(change):
    def damage(folder):
        content = json.loads((folder / "rehyat.json").read_text())
        change(content)
        (folder / "rehyat.json").write_text(json.dumps(content))

    return damage


FORMS = {
    "no_base": (edit_form(lambda form: form.pop("base")), "base should have name, identity and adapter"),
    "no_identity": (edit_form(lambda form: form["base"].update(identity="0")), "base should have name"),
    "other_name": (edit_form(lambda form: form["base"].update(name="owner/other")), "'owner/other', but base_model"),
    "adapters": (edit_form(lambda form: form["base"].update(adapter=True)), "pytorch_lora_weights.safetensors: "),
    "private_models": (edit_form(lambda form: form.update(models="/home/me/wan")), "a folder of this machine"),
    "unknown_field": (edit_form(lambda form: form.update(codecs="x")), "unknown field 'codecs'"),
}


@pytest.mark.parametrize(("damage", "words"), FORMS.values(), ids=FORMS)
def test_a_wrong_description_of_the_branch_is_refused(exports, tmp_path, capsys, damage, words):
    folder = shutil.copytree(exports / "branch", tmp_path / "export")
    damage(folder)
    assert main(["publish", str(folder), "--repo", "me/student"]) == 2
    assert words in capsys.readouterr().err


def test_what_is_no_export_is_refused(exports, tmp_path, capsys):
    for folder, repository, words in (
        (tmp_path / "none", "me/student", "expected an exported folder"),
        (exports / "base", "me/student", "config.json: is missing"),
        (exports / "complete", "student", "--repo: expected a name on the Hub"),
    ):
        assert main(["publish", str(folder), "--repo", repository]) == 2
        assert words in capsys.readouterr().err
    assert main(["to-torch", str(exports / "base"), str(tmp_path / "out"), "--layout", "original"]) == 0
    shutil.copy(exports / "complete" / "README.md", tmp_path / "out")
    assert main(["publish", str(tmp_path / "out"), "--repo", "me/student"]) == 2
    assert "export the model with --layout diffusers" in capsys.readouterr().err
