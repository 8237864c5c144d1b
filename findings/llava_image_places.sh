#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0: which image a LLaVA's placeholders read.
#
# Expected: a row whose placeholders are not as many as its image's features, and a prompt with placeholders and no image, are errors.
# Seen: placeholders are compared with features over the whole batch. Where one row lacks two and another has two more, the other row
# reads two features of the first row's image: no error, and its logits change with that image. Images in another order than the
# rows are read by the wrong rows. Without any image the placeholder's word embedding is read as if it were a word.
# Whoever cuts, sorts or splits batches has to count placeholders row by row.
# Fails if one of the three raises, or a row no longer reads another row's image.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

PLACE, FEATURES = 1, 4  # the placeholder's id; features of an image of 16 x 16 pixels in patches of 8
torch.manual_seed(0)
config = LlavaConfig(
    text_config=LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.3
    ),
    vision_config=CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    ),
    image_token_index=PLACE,
    vision_feature_layer=-1,
)
model = LlavaForConditionalGeneration(config).eval()


def last_logits(rows, pixels=None):
    with torch.no_grad():
        return model(input_ids=torch.tensor(rows), pixel_values=pixels).logits[:, -1]


def apart(a, b):
    return float((a - b).abs().max())


images = torch.randn(2, 3, 16, 16)
other = torch.stack([torch.randn(3, 16, 16), images[1]])  # another image in the first row
whole = [[5, *[PLACE] * 4, 6, 7, 8, 9], [5, *[PLACE] * 4, 6, 7, 8, 9]]
moved = [[5, *[PLACE] * 2, 6, 7, 8, 9, 10, 11], [5, *[PLACE] * 6, 6, 7]]

change = apart(last_logits(whole, images)[1], last_logits(whole, other)[1])
print(f"four places in each row: the second row's logits change by {change:.3f} with the first row's image")
assert change < 1e-5
change = apart(last_logits(moved, images)[1], last_logits(moved, other)[1])
print(f"two and six places: no error, and they change by {change:.3f}")
assert change > 1e-3, "the behaviour has changed"

turned = last_logits(whole, images.flip(0))
print(f"images in another order: no error, rows read each other's (difference {apart(turned, last_logits(whole, images).flip(0)):.1g})")
assert apart(turned, last_logits(whole, images).flip(0)) < 1e-5

without = last_logits(whole)
print(f"no image: no error, the logits are {apart(without, last_logits(whole, images)):.3f} from those with it")
words = model.get_input_embeddings()(torch.tensor(whole))
with torch.no_grad():
    assert apart(without, model(inputs_embeds=words).logits[:, -1]) < 1e-5, "the behaviour has changed"
print("as stated")
PY
