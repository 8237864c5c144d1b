#!/usr/bin/env bash
# textarena 0.7.4: how many guesses GuessTheNumber takes with max_turns.
#
# Expected: the game says "within 3 turns" and ends after the third guess.
# Seen: it ends after the fourth, and a right fourth guess wins with reward 1; with max_turns 1 after the second. Turns are numbered
# from 0, and the limit is compared before the number is raised. Without a win the reward is not 0: it is the share of the range by
# which the last guess is near, 0.55 here, so a mean reward is no share of games won.
# Whoever limits an environment by turns, or compares scores "in n guesses", has to pass n - 1 and to count wins by the reward 1.
# Fails if a game ends after max_turns guesses, or a lost game's reward is 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check textarena==0.7.4 websockets
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import textarena


def played(turns, right=None):
    """(guesses taken, reward) of a game of numbers 1 to 50 whose guesses are wrong, but for number `right`."""
    game = textarena.make("GuessTheNumber-v0-raw", min_number=1, max_number=50, max_turns=turns)
    game.reset(num_players=1, seed=0)
    said = game.get_observation()[1]
    assert f"within {turns} turns" in str(said), said
    target = game.state.game_state["game_number"]
    wrong = [number for number in range(50, 0, -1) if number != target]
    for guess in range(1, 20):
        done, _ = game.step(f"[{target if guess == right else wrong[guess - 1]}]")
        if done:
            return guess, game.close()[0][0]
        game.get_observation()
    raise SystemExit("the game does not end")


for turns in (1, 3, 5):
    guesses, reward = played(turns)
    print(f"max_turns {turns}: ended after {guesses} guesses, reward {reward:.2f} without a win")
    assert guesses == turns + 1 and 0 < reward < 1
guesses, reward = played(3, right=4)
print(f"max_turns 3, right at guess 4: ended after {guesses} guesses, reward {reward:.2f}")
assert (guesses, reward) == (4, 1)
print("as stated")
PY
