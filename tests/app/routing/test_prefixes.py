import random

from app.routing.prefixes import DEPTHS, MAX_DEPTH, prefix_keys, routing_key

PAGE_TOKENS = 16


def tokens(num, seed=0):
    drawn = random.Random(seed)
    return [drawn.randrange(50_000) for _ in range(num)]


def keys(prompt_ids, adapter=""):
    return prefix_keys(adapter, prompt_ids, PAGE_TOKENS)


def num_shared(one, other):
    return sum(a == b for a, b in zip(one, other, strict=False))


def test_depths_are_dense_at_first_and_an_eighth_apart_later():
    assert DEPTHS[:16] == tuple(range(1, 17)) and DEPTHS[-1] == MAX_DEPTH
    for depth, deeper in zip(DEPTHS, DEPTHS[1:], strict=False):
        assert deeper - depth <= max(1, depth / 8)


def test_a_key_for_each_depth_of_full_pages():
    assert keys([]) == keys(tokens(15)) == []
    assert len(keys(tokens(16))) == len(keys(tokens(31))) == 1
    assert len(keys(tokens(17 * 16))) == 16
    assert len(keys(tokens(100_000))) == len(DEPTHS)


def test_prompts_share_keys_as_far_as_they_share_pages():
    prompt = tokens(640)
    for num_common in (0, 5, 16, 100, 320, 639):
        other = prompt[:num_common] + tokens(640 - num_common, seed=1)
        shared = num_shared(keys(prompt), keys(other))
        assert shared == sum(depth * 16 <= num_common for depth in DEPTHS)
    assert keys(prompt) == keys(prompt + tokens(500, seed=2))[: len(keys(prompt))]


def test_an_adapter_has_keys_of_its_own():
    assert not set(keys(tokens(320))) & set(keys(tokens(320), "a"))


def test_a_request_goes_by_the_first_key_behind_the_hot_ones():
    own = keys(tokens(320))
    assert routing_key(own, set()) == own[0]
    assert routing_key(own, {own[4]}) == own[5]
    assert routing_key(own, {own[-1]}) == routing_key([], {own[0]}) == ""


def test_conversations_behind_one_system_prompt_keep_their_own_key():
    system = tokens(20 * 16)
    hot = {keys(system)[-1]}
    conversations = [system + tokens(600, seed) for seed in range(100)]
    chosen = []
    for prompt in conversations:
        # Its turns, from where it has an eighth of its own on.
        by_turn = {routing_key(keys(prompt[:num]), hot) for num in range(360, 900, 60)}
        assert len(by_turn) == 1
        chosen += by_turn
    assert len(set(chosen)) == 100 and "" not in chosen
