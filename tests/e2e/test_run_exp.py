"""The checking client counts and judges as it should; no server."""

from tests.e2e.run_exp import DEMO_MODEL_NAME, TASKS, accuracies, failures, make_questions


def answered(adapter_right, base_right):
    questions = make_questions(10, 4)
    for question in questions:
        is_base = question.model == DEMO_MODEL_NAME
        right = base_right if is_base else adapter_right
        question.answer = question.example.answer if right else "no idea"
    return questions


def test_every_task_is_asked_of_both_in_both_ways():
    questions = make_questions(10, 4)
    assert len(questions) == 14 * len(TASKS)
    ways = {(q.task, q.model == DEMO_MODEL_NAME, q.stream) for q in questions}
    assert len(ways) == 4 * len(TASKS)
    prompts = {(q.model, q.example.prompt) for q in questions}
    assert len(prompts) == len(questions)


def test_right_adapters_and_a_failing_base_pass():
    questions = answered(adapter_right=True, base_right=False)
    result = accuracies(questions)
    assert set(result) == set(TASKS)
    assert all(shares == {"adapter": 1.0, "base": 0.0} for shares in result.values())
    assert failures(result, questions) == []


def test_wrong_adapters_and_a_knowing_base_do_not():
    questions = answered(adapter_right=False, base_right=True)
    assert len(failures(accuracies(questions), questions)) == 2 * len(TASKS)


def test_a_lost_answer_is_a_failure():
    questions = answered(adapter_right=True, base_right=False)
    questions[0].answer, questions[0].error = None, "APIConnectionError()"
    found = failures(accuracies(questions), questions)
    assert any("APIConnectionError" in problem for problem in found)
