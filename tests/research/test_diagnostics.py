"""The instruments, each on a case whose answer is known, and the report on whole models."""

import json
import math
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import diagnose
from transnormer_hf import TransNormerConfig
from transnormer_hf.research.baselines import baseline_config
from transnormer_hf.research.diagnostics import (
    GradientDeviationCallback,
    accumulated_attention_curve,
    attention_report,
    attention_temperature,
    fit_log_normal,
    locally_accumulated_attention,
    mean_over_rows,
    measure_norm_attention_gradient,
    norm_attention_gradient_bound,
    normalize_rows,
    row_entropy,
    scaled_linear_jacobian,
    shrinking_score_gradients,
    softmax_jacobian,
    spectral_gap,
)
from transnormer_hf.research.diagnostics.report import MEASURES

SEQ = 40
BATCH, HEADS = 2, 3


def as_map(matrix):
    return matrix.double().expand(BATCH, HEADS, *matrix.shape[-2:])


def uniform(seq=SEQ):
    return as_map(torch.full((seq, seq), 1 / seq))


def identity(seq=SEQ):
    return as_map(torch.eye(seq))


def blocks(size, seq=SEQ):
    block = torch.arange(seq) // size
    return as_map((block[:, None] == block).double() / size)


def random_map(seq=SEQ, scale=1.0):
    return (scale * torch.randn(BATCH, HEADS, seq, seq, dtype=torch.float64)).softmax(-1)


INSTRUMENTS = {
    "accumulated": lambda weights, mask: locally_accumulated_attention(weights, 0.3, mask),
    "accumulated, shifted": lambda weights, mask: locally_accumulated_attention(weights, 0.3, mask, "shift"),
    "entropy": row_entropy,
    "gap": spectral_gap,
    "temperature": attention_temperature,
    "log mean": lambda weights, mask: fit_log_normal(weights, mask).mean,
    "log variance": lambda weights, mask: fit_log_normal(weights, mask).variance,
    "fit distance": lambda weights, mask: fit_log_normal(weights, mask).distance,
}


class TestMaps:
    @pytest.mark.parametrize("instrument", INSTRUMENTS.values(), ids=INSTRUMENTS)
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_changes_nothing(self, instrument, side):
        weights, mask = random_map(12), torch.zeros(BATCH, 20, dtype=torch.long)
        start = 8 if side == "left" else 0
        real = slice(start, start + 12)
        mask[:, real] = 1
        padded = torch.rand(BATCH, HEADS, 20, 20, dtype=torch.float64)
        padded[:, :, real, real] = weights * 2  # rows need not sum to 1
        found, expected = instrument(padded, mask), instrument(weights, None)
        if found.dim() == 3:  # per row
            is_padding = mask[:, None].expand_as(found) == 0
            assert found[is_padding].isnan().all()
            found = found[:, :, real]
        torch.testing.assert_close(found, expected)

    def test_uniform_map_accumulates_what_the_edges_leave(self):
        """r - r²/4 of a clipped window (0.36 at 0.4) and r of a shifted one, in the limit of long texts."""
        for ratio in (0.1, 0.4, 0.8):
            clipped = accumulated_attention_curve(uniform(800)[:1, :1], [ratio])
            torch.testing.assert_close(clipped, torch.full_like(clipped, ratio - ratio**2 / 4), atol=2e-3, rtol=0)
            shifted = accumulated_attention_curve(uniform(), [ratio], edge="shift")
            torch.testing.assert_close(shifted, torch.full_like(shifted, ratio))

    @pytest.mark.parametrize("edge", ["clip", "shift"])
    def test_identity_map_accumulates_everything_at_once(self, edge):
        curve = accumulated_attention_curve(identity(), [0.0, 0.1, 1.0], edge=edge)
        torch.testing.assert_close(curve, torch.ones(HEADS, 3).double())

    def test_accumulated_attention_by_hand(self):
        """Five tokens, r·N/2 = 1: a token and its neighbours, where there are any."""
        weights = random_map(5)
        p = weights[1, 2]
        expected = [p[i, max(0, i - 1) : i + 2].sum().item() for i in range(5)]
        assert locally_accumulated_attention(weights, 0.4)[1, 2].tolist() == pytest.approx(expected)
        # two tokens, i - 1 and i, but 0 and 1 for the first
        expected = [p[i, max(0, i - 1) : max(0, i - 1) + 2].sum().item() for i in range(5)]
        assert locally_accumulated_attention(weights, 0.4, edge="shift")[1, 2].tolist() == pytest.approx(expected)

    def test_whole_text_in_the_window_is_everything(self):
        weights = random_map()
        for ratio, edge in ((2.0, "clip"), (1.0, "shift"), (5.0, "shift")):
            curve = accumulated_attention_curve(weights, [ratio], edge=edge)
            torch.testing.assert_close(curve, torch.ones_like(curve))

    def test_entropy_in_bits(self):
        expected = {"uniform": math.log2(SEQ), "identity": 0.0, "blocks": 3.0}
        for name, weights in {"uniform": uniform(), "identity": identity(), "blocks": blocks(8)}.items():
            entropy = row_entropy(weights)
            torch.testing.assert_close(entropy, torch.full_like(entropy, expected[name]))

    def test_spectral_gap_of_known_chains(self):
        for weights, expected in ((uniform(), 1.0), (identity(), 0.0), (blocks(8), 0.0)):
            gap = spectral_gap(weights)
            torch.testing.assert_close(gap, torch.full_like(gap, expected), atol=1e-6, rtol=0)

    @pytest.mark.parametrize(("leave_0", "leave_1"), [(0.1, 0.3), (0.9, 0.8), (0.5, 0.5)])
    def test_spectral_gap_of_a_two_state_chain(self, leave_0, leave_1):
        """Its second eigenvalue is 1 - a - b."""
        chain = torch.tensor([[1 - leave_0, leave_0], [leave_1, 1 - leave_1]], dtype=torch.float64)
        gap = spectral_gap(as_map(chain))
        torch.testing.assert_close(gap, torch.full_like(gap, 1 - abs(1 - leave_0 - leave_1)), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_temperature_is_that_of_the_softmax(self, temperature):
        scores = torch.randn(1, 1, 400, 400, dtype=torch.float64)
        found = attention_temperature((scores / temperature).softmax(-1)).item()
        assert found == pytest.approx(temperature, rel=0.01)

    def test_uniform_map_has_an_infinite_temperature(self):
        assert attention_temperature(uniform().float()).isinf().all()

    def test_fit_finds_the_parameters_of_log_normal_samples(self):
        """Weights that are log-normal: rows of exp(normal) that are already normalised but for a common constant."""
        seq, deviation = 300, 0.8
        weights = (deviation * torch.randn(1, 1, seq, seq, dtype=torch.float64)).exp()
        fit = fit_log_normal(weights)
        assert fit.variance.item() == pytest.approx(deviation**2, rel=0.03)
        assert fit.mean.item() == pytest.approx(-math.log(seq) - deviation**2 / 2, abs=0.02)
        assert fit.distance.item() < 0.01
        assert fit.num_weights.item() == seq * seq

    def test_distance_is_large_for_what_is_not_log_normal(self):
        two_values = torch.where(torch.rand(1, 1, 100, 100) < 0.5, 1.0, 50.0)
        assert fit_log_normal(two_values).distance.item() > 0.3
        assert (fit_log_normal(uniform()).distance == 1).all()

    def test_signed_maps(self):
        weights = torch.tensor([[2.0, -1.0], [0.0, 0.0]])[None, None]
        assert normalize_rows(weights)[0, 0].tolist() == [[pytest.approx(2 / 3), pytest.approx(1 / 3)], [0, 0]]
        assert normalize_rows(weights, signed=True)[0, 0].tolist() == [[2, -1], [0, 0]]
        assert row_entropy(weights)[0, 0].isnan().tolist() == [False, True]
        assert mean_over_rows(row_entropy(weights)).isfinite().all()

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="weights has shape"):
            row_entropy(torch.rand(3, 4, 4))
        with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\)"):
            row_entropy(uniform(), torch.ones(2, 3))
        with pytest.raises(ValueError, match="edge='wrap'"):
            accumulated_attention_curve(uniform(), [0.1], edge="wrap")
        with pytest.raises(ValueError, match=r"ratio=-0\.1"):
            locally_accumulated_attention(uniform(), -0.1)


class TestScoreGradients:
    def test_jacobians_are_those_of_autograd(self):
        scores = torch.rand(7, dtype=torch.float64) + 0.1
        for jacobian, attention in (
            (softmax_jacobian, lambda s: s.softmax(-1)),
            (scaled_linear_jacobian, lambda s: s / s.sum()),
        ):
            expected = torch.autograd.functional.jacobian(attention, scores)
            torch.testing.assert_close(jacobian(scores), expected)
            torch.testing.assert_close(jacobian(scores.expand(2, 3, 7)), expected.expand(2, 3, 7, 7))

    def test_softmax_gradient_is_at_most_a_quarter(self):
        jacobian = softmax_jacobian(10 * torch.randn(200, 5))
        assert 0.2 < jacobian.abs().max() <= 0.25

    def test_proposition_3_1(self):
        """As scores shrink a millionfold, so the gradient of linear attention grows, and softmax's stays."""
        large, small = (shrinking_score_gradients(score, 16) for score in (1.0, 1e-6))
        for found in (large, small):
            assert found["linear"] == pytest.approx(found["linear_closed_form"])
            assert found["softmax"] == pytest.approx((1 - 1 / 16) / 16)
        assert small["linear"] / large["linear"] == pytest.approx(1e6)

    @pytest.mark.parametrize("eps_inside", [True, False], ids=["paper", "released"])
    @pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, 1.0])
    def test_norm_attention_stays_within_its_bound(self, eps_inside, scale):
        scores = scale * torch.rand(9, 9)
        found, bound = measure_norm_attention_gradient(scores, torch.randn(9, 4), torch.randn(9, 4), 1e-8, eps_inside)
        assert 0 < found <= bound.tight
        if eps_inside:
            assert bound.paper == pytest.approx(bound.tight * 1.5 * 4)
        else:
            assert bound.paper is None

    @pytest.mark.parametrize(("eps_inside", "expected"), [(True, 1e4), (False, 1e8)])
    def test_bound_is_reached_without_scores(self, eps_inside, expected):
        """One over the root of eps where it stands inside of the root, one over eps outside."""
        direction = torch.zeros(1, 4)
        direction[0, 1] = 1
        found, bound = measure_norm_attention_gradient(torch.zeros(1, 1), direction, direction, 1e-8, eps_inside)
        assert found == pytest.approx(expected) == pytest.approx(bound.tight)

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="scores has zeros"):
            scaled_linear_jacobian(torch.tensor([1.0, 0.0]))
        with pytest.raises(ValueError, match="score=0"):
            shrinking_score_gradients(0, 4)
        with pytest.raises(ValueError, match="seq_len=1"):
            shrinking_score_gradients(1.0, 1)
        with pytest.raises(ValueError, match="eps=0"):
            norm_attention_gradient_bound(1, 1, 4, 0, True)


class Slope(torch.nn.Module):
    """Loss a·w per batch: its gradient is a."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, factor):
        return {"loss": (factor * self.weight).mean()}


class TestGradientDeviation:
    def train(self, tmp_path, callback, factors=(1.0, 2.0, 3.0, 4.0)):
        rows = [{"factor": torch.tensor(factor)} for factor in factors]
        arguments = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=1,
            num_train_epochs=1,
            max_grad_norm=0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        Trainer(Slope(), arguments, train_dataset=rows, callbacks=[callback]).train()

    def test_is_the_deviation_over_the_mean_of_the_norms(self, tmp_path):
        callback = GradientDeviationCallback()
        self.train(tmp_path, callback)
        assert sorted(callback.norms) == [1, 2, 3, 4]
        assert callback.relative_deviation == pytest.approx(math.sqrt(5 / 3) / 2.5)
        written = json.loads((tmp_path / "gradient_deviation.json").read_text())
        assert written["relative_deviation"] == callback.relative_deviation
        assert written["norms"] == callback.norms
        assert "2-norm" in written["definition"]

    def test_first_steps_may_be_left_out(self, tmp_path):
        callback = GradientDeviationCallback(skip_steps=3)
        self.train(tmp_path, callback)
        assert math.isnan(callback.relative_deviation)
        assert json.loads((tmp_path / "gradient_deviation.json").read_text())["relative_deviation"] is None
        with pytest.raises(ValueError, match="skip_steps=-1"):
            GradientDeviationCallback(-1)


FIELDS = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}


def make_model(kind):
    if kind == "bert":
        return BertModel(BertConfig(**FIELDS, intermediate_size=32, attn_implementation="eager"))
    if kind in ("t1", "t2"):
        return AutoModelForMaskedLM.from_config(TransNormerConfig(**FIELDS, variant=kind, block_size=4))
    if kind == "hybrid":
        return AutoModel.from_config(TransNormerConfig(**FIELDS, block_size=4, layer_types=["hybrid"] * 2))
    return AutoModel.from_config(baseline_config(TransNormerConfig(**FIELDS), kind))


def make_batch():
    ids = torch.randint(3, 40, (BATCH, 12))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


class TestReport:
    @pytest.mark.parametrize("kind", ["t1", "t2", "hybrid", "bert", "softmax", "performer", "lln"])
    def test_measures_every_layer(self, kind, tmp_path):
        model, batch = make_model(kind).train(), make_batch()
        report = attention_report(model, batch)
        assert model.training
        assert getattr(model.config, "backend", "auto") == "auto"
        count = 4 if kind == "hybrid" else 2
        assert len(report.layers) == len(report.maps) == count
        for layer in report.layers:
            assert all(len(layer[measure]) == 2 for measure in MEASURES)
            assert layer["curve"] == sorted(layer["curve"])
            assert all(0 <= entropy <= math.log2(12) for entropy in layer["entropy"])
        assert json.loads(report.to_json())["layers"] == report.layers
        table = report.to_markdown().splitlines()
        assert len(table) == count + 2
        assert "spectral_gap" in table[0]

    def test_numbers_are_those_of_the_instruments(self):
        model, batch = make_model("bert").eval(), make_batch()
        report = attention_report(model, batch)
        weights = model(**batch, output_attentions=True).attentions[1]
        expected = mean_over_rows(row_entropy(weights, batch["attention_mask"])).tolist()
        assert report.layers[1]["entropy"] == pytest.approx(expected)
        expected = accumulated_attention_curve(weights, report.ratios, batch["attention_mask"]).mean(0).tolist()
        assert report.layers[1]["curve"] == pytest.approx(expected)

    def test_blocks_are_seen_as_blocks(self):
        layers = attention_report(make_model("t2"), make_batch()).layers
        assert [layer["kind"] for layer in layers] == ["chunked_attention", "linear_attention"]
        assert max(layers[0]["entropy"]) <= 2 < min(layers[1]["entropy"])  # blocks of four tokens
        assert layers[0]["spectral_gap"] == pytest.approx([0, 0], abs=1e-5)

    def test_saves_numbers_and_one_figure_per_layer(self, tmp_path):
        pytest.importorskip("matplotlib")
        attention_report(make_model("t2"), make_batch()).save(tmp_path)
        written = sorted(path.name for path in tmp_path.iterdir())
        assert written == ["attention.json", "attention.md", "layer_0.png", "layer_1.png"]
        assert (tmp_path / "layer_0.png").read_bytes().startswith(b"\x89PNG")

    def test_model_without_maps_is_named(self):
        model = BertModel(BertConfig(**FIELDS, intermediate_size=32, attn_implementation="eager"))
        model.forward = lambda **kwargs: {"attentions": None}
        with pytest.raises(ValueError, match=r"BertModel.*attn_implementation='eager'"):
            attention_report(model, make_batch())


class TestScript:
    def save(self, folder):
        from tokenizers import Tokenizer, models, pre_tokenizers

        vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "good": 4, "film": 5, "bad": 6}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(
            folder
        )
        make_model("t2").save_pretrained(folder)

    def test_writes_one_page_with_everything_in_it(self, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        self.save(tmp_path / "model")
        page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
        texts = ["--text", "good film <script>alert(1)</script> & 'more'", "--text", "bad film film"]
        diagnose.main(["--model", str(tmp_path / "model"), *texts, "--output", str(page), "--json", str(numbers)])
        html = page.read_text(encoding="utf-8")
        root = ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>"))  # well-formed
        images = root.findall(".//img")
        assert len(images) == 2
        assert all(image.get("src").startswith("data:image/png;base64,") for image in images)
        assert root.find(".//script") is None
        assert "<script>alert(1)</script> & 'more'" in root.find(".//pre").text
        assert len(root.findall(".//tbody/tr")) == len(json.loads(numbers.read_text())["layers"]) == 2
        assert "http" not in html
        assert str(page) in capsys.readouterr().out

    @pytest.mark.slow
    def test_a_browser_shows_the_page_without_errors(self, tmp_path):
        pytest.importorskip("matplotlib")
        browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if browser is None:
            pytest.skip("needs chromium or google-chrome")
        self.save(tmp_path / "model")
        page = tmp_path / "page.html"
        diagnose.main(["--model", str(tmp_path / "model"), "--text", "good <film>", "--output", str(page)])
        # what the browser made of the page, written into its title
        count = """<script>
        window.onerror = () => { document.title = "error"; };
        window.onload = () => {
          const shown = [...document.images].filter((image) => image.naturalWidth > 100);
          document.title = "images shown: " + shown.length;
        };
        </script>"""
        page.write_text(page.read_text(encoding="utf-8").replace("</body>", count + "</body>"), encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
        command = [browser, *options, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
        result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        assert "<title>images shown: 2</title>" in result.stdout
        assert "good &lt;film&gt;" in result.stdout
        assert "CONSOLE" not in result.stderr

    def test_missing_model_is_one_line(self, tmp_path):
        with pytest.raises(SystemExit, match="error: "):
            diagnose.main(
                ["--model", str(tmp_path / "nothing"), "--text", "x", "--output", str(tmp_path / "page.html")]
            )
        assert not (tmp_path / "page.html").exists()
