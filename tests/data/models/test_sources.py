"""Where a base model comes from, before anything of it is loaded."""

import re

import pytest

from petl.data.models.sources import read_source
from petl.errors import InputError


def test_a_folder_given_as_a_name_on_the_hub_is_answered_with_the_setting_for_folders(tmp_path):
    settings = {"source": "hub", "name": str(tmp_path)}
    with pytest.raises(InputError, match=f"model.path={re.escape(str(tmp_path))}$"):
        read_source(settings).check()
