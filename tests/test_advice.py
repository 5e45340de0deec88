"""What next, by outcome: each finding gets its step, from files alone."""
import json

import pytest

from isara_jax.advice import advise

COMMAND = "python -m isara_jax.train --config=configs/own.py --workdir=runs/mine --config.data.seeds=mine.csv"
BETTER, SAME, WORSE = ("better", 0.06), ("not distinguishable with 40 rows", 0.01), ("worse", -0.05)


def run(folder, *, against=None, control={"difference": 0.05}, held_out=(3.0, 2.9, 2.9), kept=40, seeds=40, data=None, command=COMMAND):
    """A workdir's files as far as advice reads them. `against` maps baselines to (said, difference)."""
    root = folder / "mine"
    (root / "pool").mkdir(parents=True)
    (root / "pool" / "000-seeds.jsonl").write_text("{}\n" * seeds)
    config = {"model": {"name": "smollm2-135m-instruct"}, "stop": {"iterations": 2}, "data": {"folds": 0, "test_share": 0.25} | (data or {})}
    (root / "config.json").write_text(json.dumps({"config": config}))
    (root / "command.txt").write_text(command + "\n")
    for t, loss in enumerate(held_out):
        place = root / "iterations" / f"{t:02d}"
        place.mkdir(parents=True)
        (place / "DONE").write_text(json.dumps({"held_out": loss, "kept": kept, "requests": 100, "funnel": {"rejected": {"question novelty": 70}}}))
    if against:
        made = {"primary": "rougeL", "label": "ROUGE-L", "better": 1, "control": control,
                "comparisons": [{"baseline": n, "said": said, "difference": d, "detectable": 0.08, "rows": 40} for n, (said, d) in against.items()]}
        (root / "evaluation" / "dev").mkdir(parents=True)
        (root / "evaluation" / "dev" / "results.json").write_text(json.dumps({"verdict": made}))
    return root


def said(root):
    return " | ".join(f"{step.text} [{step.command}]" for step in advise(root))


def test_a_better_model_is_served_and_first_trained_on_everything(tmp_path):
    text = said(run(tmp_path, against={"base": BETTER, "icl_knn": BETTER, "sft_steps": BETTER}))
    assert "better than the starting one: serve it [python -m isara_jax.chat --model=runs/mine]" in text
    assert f"train on every pair, those it was judged on too [{COMMAND} --refit_all]" in text
    steps = [step.command for step in advise(tmp_path / "mine")]
    served = steps.index("python -m isara_jax.chat --model=runs/mine")
    assert steps[served + 1] == "python -m isara_jax.export --workdir=runs/mine --out=runs/mine/export"
    assert "ICL-kNN" not in text and "seeds alone" not in text


def test_without_the_control_better_may_be_form_alone(tmp_path):
    text = said(run(tmp_path, against={"base": BETTER, "icl_knn": BETTER}, control=None))
    assert "no shuffled-answers control ran, so it may be better in form alone. Read answers before you serve it" in text and ": serve it" not in text
    assert "isara_jax.export" not in text


@pytest.mark.parametrize("icl", [SAME, WORSE])
def test_icl_knn_that_is_as_good_is_to_be_used(tmp_path, icl):
    text = said(run(tmp_path, against={"base": BETTER, "icl_knn": icl}))
    assert "needs no training: use it instead of the tuned one [python -m isara_jax.chat --model=smollm2-135m-instruct --icl_knn=runs/mine]" in text


def test_fine_tuning_on_the_seeds_alone_that_is_as_good_is_said(tmp_path):
    assert "generated pairs have not shown their worth" in said(run(tmp_path, against={"base": BETTER, "icl_knn": BETTER, "sft_steps": SAME}))


def test_a_worse_model_is_not_served(tmp_path):
    text = said(run(tmp_path, against={"base": WORSE, "icl_knn": WORSE}))
    assert "do not use it" in text and "serve" not in text


def test_nothing_shown_names_what_the_rows_could_show(tmp_path):
    assert "40 rows show a difference of 8.0 points of ROUGE-L or more" in said(run(tmp_path, against={"base": SAME, "icl_knn": BETTER}))


def test_a_gain_of_form_is_not_called_better(tmp_path):
    text = said(run(tmp_path, against={"base": ("a gain of form, not of content", 0.1)}))
    assert "a gain of form, not of content. Read answers before you serve it" in text and "serve it [" in text


def test_a_falling_loss_asks_for_one_more_iteration(tmp_path):
    text = said(run(tmp_path, held_out=(3.0, 2.9, 2.8), command=COMMAND + " --config.stop.iterations=2"))
    assert f"one more iteration [{COMMAND} --config.stop.iterations=3]" in text


def test_a_dry_pool_asks_for_seeds_and_says_why(tmp_path):
    text = said(run(tmp_path, held_out=(3.0, 2.9, 2.8), kept=20))
    assert "kept 20 of 100; most were rejected by question novelty: more seeds" in text and "one more iteration" not in text


def test_few_seeds(tmp_path):
    assert "there are 12 seeds" in said(run(tmp_path, seeds=12))


def test_an_unjudged_run_may_be_judged_in_another_workdir(tmp_path):
    text = said(run(tmp_path, data={"test_share": 0.0}))
    assert "nothing judged this run" in text and "--workdir=runs/mine-judged --config.data.test_share=0.25" in text and "--workdir=runs/mine " not in text


def test_a_fold_has_no_model_of_its_own_to_serve(tmp_path):
    root = run(tmp_path, against={"base": BETTER, "icl_knn": SAME}, data={"folds": 3, "test_share": 0.0, "seeds": "mine.csv"})
    text = said(root)
    assert text.index("--refit_all]") < text.index("--model=runs/mine/all]") and "--icl_knn=mine.csv]" in text
    assert "--workdir=runs/mine/all --out=runs/mine/all/export]" in text


def test_a_review_that_waits_comes_before_everything(tmp_path):
    root = run(tmp_path, held_out=(3.0,))
    (root / "review.csv").write_text("x")
    assert [step.command for step in advise(root)] == [COMMAND] and "review.csv" in advise(root)[0].text


def test_an_unfinished_run_is_continued_and_an_empty_folder_is_nothing(tmp_path):
    assert said(run(tmp_path, held_out=(3.0,))) == f"the run is not finished: the same command continues it [{COMMAND}]"
    assert "nothing was started" in said(tmp_path / "elsewhere")


def test_a_run_from_python_has_no_command_to_repeat(tmp_path):
    text = said(run(tmp_path, against={"base": BETTER}, held_out=(3.0, 2.9, 2.8), command="my_script.py"))
    assert "one more iteration []" in text and "--refit_all" not in text
