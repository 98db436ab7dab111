"""Regions of an edit: thin masks and small boxes touch a token, and what is outside can be kept to the pixel."""

import pytest
import torch
from tiny_model import save_tiny

import varkern


@pytest.fixture(scope="module")
def var(tmp_path_factory):
    return varkern.load(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def picture():
    return torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)).mul(2).sub(1)


@pytest.mark.parametrize("side", [3, 32, 500])
def test_one_marked_pixel_is_generated_again(var, picture, side):
    mask = torch.zeros(side, side)
    mask[side // 2, side // 2] = 1
    own = [tokens.clone() for tokens in var.vae_proxy[0].img_to_idxBl(picture)]
    drawn = [varkern.edit.inpaint(var, picture, mask=mask, seed=seed).tokens[-1] for seed in range(8)]
    assert any(not torch.equal(tokens, own[-1]) for tokens in drawn)
    around = varkern.edit.outpaint(var, picture, mask=1 - mask, seed=0).images
    assert torch.equal(around, varkern.edit.inpaint(var, picture, mask=mask, seed=0).images)


def test_a_small_box_marks_the_cells_it_touches():
    assert varkern.edit.box_mask(4, (0.3, 0.3, 0.31, 0.31)).nonzero().tolist() == [[1, 1]]
    assert varkern.edit.box_mask(4, (0.99, 0.0, 1.0, 1.0)).nonzero().tolist() == [[3, i] for i in range(4)]


@pytest.mark.parametrize("paint", [varkern.edit.inpaint, varkern.edit.outpaint])
def test_pasting_back_keeps_what_is_outside(var, picture, paint):
    mask = torch.zeros(32, 32)
    mask[10] = 1
    made = paint(var, picture, mask=mask, seed=0, paste_back=True).images
    free = paint(var, picture, mask=mask, seed=0).images
    inside = (mask > 0) == (paint is varkern.edit.inpaint)
    assert torch.equal(made[..., inside], free[..., inside])
    assert torch.equal(made[..., ~inside], picture.add(1).div(2)[..., ~inside])
    assert not torch.equal(free[..., ~inside], made[..., ~inside])


def test_nothing_outside_of_a_box(picture, tmp_path):
    var = varkern.load(save_tiny(tmp_path / "tiny"))
    with pytest.raises(ValueError, match="leaves nothing to generate outside of it"):
        varkern.edit.outpaint(var, picture, box=(0.0, 0.0, 1.0, 1.0))
