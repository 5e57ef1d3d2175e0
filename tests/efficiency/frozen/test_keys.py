"""Keys of rows: one for a row in batches of any width, another for any other row."""

import torch

from petl.efficiency.frozen.keys import rows_of

IDS = torch.tensor([[5, 6, 7, 0], [5, 6, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])


def keys(**arguments) -> list[bytes]:
    rows = rows_of(arguments)
    assert rows.keys, rows.reason
    return rows.keys


def test_a_row_has_one_key_in_batches_of_any_width():
    wide, narrow = keys(input_ids=IDS, attention_mask=MASK), keys(input_ids=IDS[1:, :2])
    assert wide[0] != wide[1]
    assert wide[1:] == narrow
    rows = rows_of({"input_ids": IDS, "attention_mask": MASK})
    assert rows.lengths == [3, 2]
    assert rows.width == (4,)


def test_what_is_in_the_padding_does_not_count():
    filled = IDS.masked_fill(MASK == 0, 9)
    assert keys(input_ids=IDS, attention_mask=MASK) == keys(input_ids=filled, attention_mask=MASK)
    # without a mask, all of it is read
    assert keys(input_ids=IDS) != keys(input_ids=filled)


def test_tokens_types_and_positions_count():
    plain = keys(input_ids=IDS)
    types = keys(input_ids=IDS, token_type_ids=torch.zeros_like(IDS))
    others = keys(input_ids=IDS, token_type_ids=torch.ones_like(IDS))
    positions = keys(input_ids=IDS, position_ids=torch.arange(4)[None])
    assert len({*plain, *types, *others, *positions}) == 8


def test_a_packed_row_has_the_same_key_beside_rows_of_several_texts():
    alone = rows_of({"input_ids": IDS, "attention_mask": MASK}, packs=True).keys
    positions = torch.tensor([[0, 1, 2, 0], [0, 0, 0, 0]])
    beside = {"input_ids": IDS, "attention_mask": MASK, "position_ids": positions}
    packed = rows_of(beside, packs=True).keys
    assert packed[0] == alone[0]  # one text
    assert packed[1] != alone[1]  # two texts of one token
    assert rows_of(beside).keys[0] != alone[0]  # some models count otherwise without positions


def test_images_count_with_all_of_their_pixels():
    pixels = torch.randn(3, 3, 4, 4)
    rows = rows_of({"pixel_values": pixels})
    assert len(set(rows.keys)) == 3
    assert rows.lengths is None
    pixels[1, 2, 3, 3] += 1
    assert [a == b for a, b in zip(rows.keys, keys(pixel_values=pixels), strict=True)] == [1, 0, 1]
    assert keys(pixel_values=pixels) != keys(pixel_values=pixels.double())


def test_what_the_blocks_read_besides_rows_leaves_them_without_keys():
    def reason(**arguments):
        rows = rows_of({"input_ids": IDS, **arguments})
        assert not rows.keys
        return rows.reason

    assert reason(attention_mask=MASK.flip(1)) == "rows are padded on the left"
    assert reason(past_key_values=object()) == "past_key_values is given"
    assert reason(use_cache=True) == "use_cache is given"
    assert reason(output_hidden_states=True) == "output_hidden_states is given"
    assert reason(inputs_embeds=torch.zeros(2, 4, 8)) == "inputs_embeds is given"
    assert "[rows, tokens]" in reason(attention_mask=torch.zeros(2, 1, 4, 4))
    assert rows_of({}).reason
    harmless = {"return_dict": True, "use_cache": False, "num_items_in_batch": torch.tensor(3)}
    assert rows_of({"input_ids": IDS, **harmless}).keys == keys(input_ids=IDS)


def test_tokens_that_differ_by_a_multiple_of_256_make_other_rows():
    rows = torch.tensor([[5, 6], [5 + 256, 6], [5, 6 + 65536], [5 + 2**32, 6]])
    assert len({*keys(input_ids=rows)}) == 4
