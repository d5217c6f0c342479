"""Our list of bad inputs, row by row: which tests each row has.

`BAD` and `FINE` stand for the requests of that number in `test_bad_requests.py`; other files are named from `tests/`.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.serving.test_bad_requests import BAD, FINE

TESTS = Path(__file__).resolve().parents[1]
HERE, CHAT, HARD = "serving/test_bad_requests.py::", "serving/test_chat.py::", "serving/test_hardship.py::"
LOCAL, IMAGE, AUDIO = "backends/test_local.py::", "media/test_image.py::", "media/test_audio.py::"
VIDEO, FOLDER, JINJA = "media/test_video.py::", "safety/test_model_folder.py::", "safety/test_jinja_sandbox.py::"
PAGE, FETCH, MEDIA = "serving/test_page.py::", "serving/test_fetching.py::", "serving/test_media_requests.py::"
KEPT, QUEUE, FORMS = "generation/test_kept.py::", "serving/test_scheduler.py::", "serving/test_forms.py::"
NEVER_DIALLED = f"{FETCH}test_an_address_that_is_not_public_is_never_dialled"
ONE_FOLDER = (
    f"{FETCH}test_files_of_one_folder_alone_are_opened",
    f"{FETCH}test_a_file_that_changes_into_a_link_is_not_followed",
)
FOLDERS = f"{FOLDER}test_bad_folders_are_refused_before_they_are_opened"
KEYS = f"{CHAT}test_the_key_is_needed_everywhere_but_for_health"
READ_AGAIN = f"{LOCAL}test_other_images_are_read_even_where_the_ids_are_the_same"

ROWS: dict[int, tuple[str, ...]] = {
    1: ("BAD",),
    2: (f"{HERE}test_headers",),
    3: (f"{HERE}test_headers",),
    4: ("BAD",),
    5: ("BAD",),
    6: ("BAD", f"{HARD}test_of_a_key_given_twice_the_last_counts"),
    7: (
        f"{HERE}test_headers",
        f"{HERE}test_a_body_beyond_the_limit_or_that_never_ends",
        f"{HARD}test_large_bodies_wait_for_each_other",
        f"{HARD}test_rubbish_behind_an_answer",
    ),
    8: (
        f"{HERE}test_a_head_that_never_ends",
        f"{HARD}test_hundreds_of_idle_connections_keep_nobody_out",
        f"{HARD}test_slow_bodies_keep_nobody_out",
    ),
    9: (
        f"{HERE}test_headers",
        f"{HERE}test_odd_requests_of_http",
        f"{HARD}test_what_is_no_http_is_answered_as_an_error",
        f"{CHAT}test_strange_pages_and_names_are_refused",
    ),
    10: (
        f"{CHAT}test_a_client_that_goes_takes_its_request_along",
        f"{CHAT}test_a_client_that_goes_gives_its_place_in_the_queue_back",
        f"{HARD}test_a_client_that_goes_before_the_first_step",
        f"{QUEUE}test_a_client_that_goes_frees_its_row",
    ),
    11: (f"{CHAT}test_a_client_that_does_not_read_is_left",),
    12: (
        f"{CHAT}test_many_at_once",
        f"{CHAT}test_a_full_queue_says_when_to_come_back",
        f"{HARD}test_two_hundred_at_once",
        f"{HARD}test_the_queue_is_fair",
        f"{QUEUE}test_a_queue_that_is_full_counts_those_that_wait",
        f"{QUEUE}test_many_at_once_get_what_they_get_alone",
    ),
    13: ("BAD",),
    14: ("BAD", "FINE"),
    15: ("BAD", f"{HARD}test_content_of_another_form"),
    16: ("BAD",),
    17: ("BAD",),
    18: ("BAD", "FINE"),
    19: ("BAD", "FINE"),
    20: ("BAD",),
    21: (f"{HERE}test_flipped_bits", f"{HARD}test_a_thousand_damaged_files"),
    22: (
        "BAD",
        f"{MEDIA}test_22_a_header_that_claims_gigapixels",
        f"{IMAGE}test_a_huge_header_is_refused_before_decoding",
    ),
    23: ("BAD", f"{MEDIA}test_23_an_image_beyond_pixels_or_sides", f"{IMAGE}test_a_large_image_in_memory_is_refused"),
    24: ("FINE", f"{IMAGE}test_one_pixel"),
    25: ("FINE", f"{MEDIA}test_25_animations_are_their_first_frame", f"{IMAGE}test_animation_gives_its_first_frame"),
    26: ("BAD",),
    27: ("BAD", "FINE", f"{IMAGE}test_formats_that_are_not_allowed"),
    28: (
        f"{MEDIA}test_28_chunks_that_are_too_large_or_too_many",
        f"{IMAGE}test_files_that_take_minutes_to_decode_are_refused",
    ),
    29: (f"{MEDIA}test_29_exif", f"{IMAGE}test_exif_orientation", f"{IMAGE}test_damaged_exif_does_not_matter"),
    30: (
        "FINE",
        f"{MEDIA}test_30_every_mode",
        f"{IMAGE}test_every_mode_gives_rgb",
        f"{IMAGE}test_transparency_shows_the_background",
    ),
    31: (f"{MEDIA}test_31_profiles_and_gamma_change_no_pixel",),
    32: (
        f"{KEPT}test_same_pixels_in_two_encodings_are_one_image",
        READ_AGAIN,
        f"{LOCAL}test_a_conversation_that_goes_on_reads_its_images_once",
    ),
    33: (f"{KEPT}test_what_only_looks_the_same_is_read_anew", READ_AGAIN),
    34: (
        f"{KEPT}test_what_only_looks_the_same_is_read_anew",
        f"{LOCAL}test_what_was_read_with_other_weights_is_not_used",
    ),
    35: ("BAD 16",),
    36: (f"{KEPT}test_a_flood_of_small_images_stays_within_bounds",),
    37: ("BAD", f"{FETCH}test_without_the_options_nothing_is_asked_and_nothing_opened"),
    38: (NEVER_DIALLED,),
    39: (f"{FETCH}test_an_address_of_another_form_or_host_is_refused", NEVER_DIALLED),
    40: (f"{FETCH}test_redirects_are_checked_as_addresses_are",),
    41: (f"{FETCH}test_a_name_is_looked_up_once_and_its_address_kept",),
    42: (f"{FETCH}test_what_is_too_much_or_never_ends_is_left",),
    43: ("BAD", f"{FETCH}test_an_address_of_another_form_or_host_is_refused"),
    44: ("BAD", *ONE_FOLDER),
    45: ("BAD", f"{FETCH}test_without_the_options_nothing_is_asked_and_nothing_opened"),
    46: ("BAD",),
    47: (f"{HARD}test_images_alone_that_do_not_fit", f"{LOCAL}test_media_that_do_not_fit_are_refused"),
    48: ("FINE", f"{CHAT}test_names_of_special_tokens_are_plain_text", f"{HARD}test_names_of_special_tokens_anywhere"),
    49: (f"{HARD}test_a_placeholder_without_an_image_is_text", f"{HERE}test_what_a_model_does_not_take"),
    50: (
        "data/test_conversations.py::test_broken_records",
        "data/test_check.py::test_every_planted_fault_is_found_and_no_good_row_is_lost",
        "data/test_index.py::test_a_broken_row_stops_the_build_or_is_listed",
    ),
    51: ("BAD",),
    52: ("BAD", "FINE", "generation/test_text.py::test_bytes_are_never_lost"),
    53: ("BAD",),
    54: ("BAD",),
    55: ("BAD",),
    56: ("BAD", f"{FORMS}test_penalties_and_bias_reach_the_model"),
    57: ("BAD", "generation/test_text.py::test_stop_text_is_cut_and_never_shown"),
    58: ("BAD", f"{FORMS}test_a_schema_is_met_whole_and_in_pieces"),
    59: ("BAD", f"{FORMS}test_what_of_tools_is_refused"),
    60: ("BAD",),
    61: ("BAD",),
    62: ("BAD", "FINE", f"{MEDIA}test_62_odd_sounds", f"{AUDIO}test_what_cannot_be_read_is_one_clear_line"),
    63: (
        f"{MEDIA}test_63_sounds_that_unpack_to_hours",
        f"{AUDIO}test_a_small_file_of_long_silence_stops_at_the_limit",
        f"{AUDIO}test_a_file_of_single_samples_stops_at_the_limit",
    ),
    64: (
        "BAD",
        f"{MEDIA}test_64_odd_videos",
        f"{VIDEO}test_bad_files_give_one_line",
        f"{VIDEO}test_nothing_but_the_file_itself_is_opened",
        f"{VIDEO}test_ten_hours_are_refused_unless_allowed",
        f"{VIDEO}test_times_of_a_variable_rate",
        f"{VIDEO}test_a_small_file_that_claims_two_billion_frames",
        f"{VIDEO}test_limits",
    ),
    65: (KEYS,),
    66: (KEYS, f"{PAGE}test_only_the_pages_own_files_come_without_the_key"),
    67: (f"{CHAT}test_strange_pages_and_names_are_refused",),
    68: (f"{HERE}test_the_log_keeps_to_its_lines",),
    69: (f"{PAGE}test_a_reply_is_text_whatever_it_holds", f"{PAGE}test_the_page_reads_no_text_as_html"),
    70: (FOLDERS, f"{FOLDER}test_nan_weights_are_named", f"{FOLDER}test_tensors_that_do_not_fit_are_listed"),
    71: (FOLDERS, f"{FOLDER}test_the_configuration_of_a_hub_id_is_looked_over_too"),
    72: (
        f"{JINJA}test_attacks_end_at_once",
        f"{JINJA}test_nothing_large_is_made_to_find_out",
        f"{JINJA}test_a_chat_template_that_hangs_stops_its_model",
    ),
    73: (
        "data/test_conversations.py::test_broken_records",
        "data/test_conversations.py::test_broken_files",
        "data/test_readers_archives.py::test_tar_members_that_are_refused",
        "data/test_json_files.py::test_a_list",
        "data/test_json_files.py::test_a_stream_is_never_held_whole",
        "data/test_check.py::test_every_planted_fault_is_found_and_no_good_row_is_lost",
    ),
    74: (
        f"{CHAT}test_a_port_that_is_taken",
        f"{CHAT}test_the_command_answers_and_drains",
        f"{HARD}test_a_request_for_which_there_is_no_memory",
        f"{HARD}test_a_cache_folder_that_cannot_be_written",
        "modeling/test_onnx_llm.py::test_a_graph_that_nobody_asked_for_needs_no_place",
        f"{HARD}test_sudden_death_and_a_restart",
        f"{HARD}test_a_full_disk_leaves_nothing_half_written",
        f"{HARD}test_a_killed_writer_leaves_no_folder_that_looks_whole",
        "data/test_index.py::test_what_a_killed_build_left_behind_goes",
    ),
    # The hours under load of this row are `make soak`, which no test suite waits for.
    75: (
        f"{HARD}test_a_clock_that_jumps",
        f"{HARD}test_only_stamps_are_taken_from_the_time_of_day",
        f"{HARD}test_two_writers_of_one_folder",
    ),
}


@cache
def functions(path: Path) -> frozenset[str]:
    return frozenset(node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))


def requests_of(row: int, table: list[tuple[str, ...]]) -> list[str]:
    """The requests of a table that are of a row; a label begins with its row, or with several."""
    found = []
    for label in (str(entry[0]) for entry in table):
        if (numbers := re.match(r"(\d+)(?:-(\d+))?\b", label)) and int(numbers[1]) <= row <= int(
            numbers[2] or numbers[1]
        ):
            found.append(label)
    return found


def test_every_row_is_there() -> None:
    assert sorted(ROWS) == list(range(1, 76))


@pytest.mark.parametrize("row", ROWS)
def test_what_a_row_names_exists(row: int) -> None:
    assert ROWS[row]
    for name in ROWS[row]:
        if name.startswith(("BAD", "FINE")):
            kind, _, other = name.partition(" ")
            assert requests_of(int(other or row), BAD if kind == "BAD" else FINE), name  # type: ignore[arg-type]
        else:
            file, _, function = name.partition("::")
            assert function in functions(TESTS / file), name
