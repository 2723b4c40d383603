"""Fault cases of the cache by number, and the tests that hold them (test_fault_table.py holds this table to the code).

==  ==========================================================  =====================================================
 n  case                                                        tests
==  ==========================================================  =====================================================
 1  kill -9 anywhere: resumed, byte-equal                       cache_schema/test_crash.py::test_killed_at_any_file_operation_and_resumed_the_store_is_byte_equal
                                                                cache_schema/test_crash.py::test_killed_at_every_single_file_operation_and_resumed_the_store_is_byte_equal
                                                                cache_schema/test_crash.py::test_01_06_two_extractions_killed_at_25_random_moments_lose_and_damage_nothing
                                                                cache_schema/test_state_machine.py::test_01_18_any_order_of_extraction_death_damage_and_repair_ends_in_the_same_store
                                                                extract/test_run.py::test_killed_at_twenty_random_moments_the_store_is_byte_equal_to_one_never_interrupted
                                                                (200 kills: python -m tests.bench.kill200)
 2  a stop signal: the shard is finished, exit 75               extract/test_interrupted.py::test_02_a_signal_lets_the_shard_at_hand_be_finished_and_exits_75_and_the_next_run_ends_the_same
                                                                pipeline/test_errors.py::test_a_signal_ends_the_command_after_its_clean_up
 3  second Ctrl-C: leaves at once                               pipeline/test_errors.py::test_a_second_ctrl_c_leaves_at_once
                                                                extract/test_interrupted.py::test_03_a_second_ctrl_c_leaves_at_once_and_the_store_is_readable_and_goes_on
 4  disk full: exit 75, nothing committed is harmed             extract/test_interrupted.py::test_04_a_full_disk_exits_75_harms_nothing_and_the_next_run_with_room_ends_the_same
                                                                cache_schema/test_io_faults.py::test_04_05_calls_fail_all_over_a_run_and_the_resumed_store_is_byte_equal
                                                                cache_schema/test_faults.py::test_a_full_disk_at_any_call_leaves_nothing_behind_and_harms_nothing
                                                                pipeline/test_cli.py::test_a_full_disk_exits_with_75_and_says_how_to_go_on
 5  EIO, no permission: exit 5, path named                      cache_schema/test_io_faults.py::test_04_05_every_call_fails_once_and_the_resumed_store_is_byte_equal
                                                                extract/test_interrupted.py::test_05_a_disk_that_cannot_be_written_exits_5_with_the_path_and_harms_nothing
                                                                cache_schema/test_faults.py::test_a_file_size_limit_of_the_system_is_an_ordinary_error
                                                                pipeline/test_errors.py::test_every_kind_of_error_has_its_exit_code
 6  two processes on one store: the commit decides, no loss     extract/test_interrupted.py::test_06_two_extractions_that_meet_make_one_store_and_neither_fails
                                                                extract/test_conveyor.py::test_the_parts_of_an_extraction_do_every_video_once_and_end_in_the_same_store
                                                                cache_schema/test_crash.py::test_two_writers_of_the_same_tasks_make_one_store_without_loss
 8  shard deleted: training refused, listed, repaired           cache_schema/test_faults.py::test_a_damaged_shard_is_found_and_named_and_never_taken_for_missing
                                                                cache_schema/test_repair.py::test_repair_gives_the_bytes_that_were_there_and_touches_nothing_else
                                                                pipeline/test_cache_commands.py::test_08_10_damage_is_listed_with_what_to_run_and_repaired_to_the_same_bytes
                                                                pipeline/test_cache_commands.py::test_08_09_11_12_training_on_a_damaged_store_is_refused_with_4_and_the_command
 9  shard of no bytes: the same                                 cache_schema/test_damage.py::test_09_11_truncations_anywhere_are_found_and_named (and the tests of 8)
10  one flipped bit: shard, video and frame named               cache_schema/test_damage.py::test_10_single_bit_flips_anywhere_are_found_and_named_by_shard_video_and_frame
                                                                cache_schema/test_damage.py::test_10_a_thousand_single_bit_flips_and_200_truncations
                                                                cache_schema/test_faults.py::test_one_flipped_bit_of_a_frame_is_named_by_shard_video_and_frame
11  shard truncated                                             cache_schema/test_damage.py::test_09_11_truncations_anywhere_are_found_and_named (and the tests of 8)
12  two shards swapped                                          cache_schema/test_faults.py::test_a_damaged_shard_is_found_and_named_and_never_taken_for_missing
13  plan truncated or half a line: refused by name              cache_schema/test_format.py::test_metadata_that_is_not_sound_json_is_corrupt_and_the_file_is_named
                                                                cache_schema/test_format.py::test_a_plan_of_a_newer_format_or_with_a_missing_generation_is_refused
14  newer format version: refused, both versions named          cache_schema/test_format.py::test_a_group_that_is_not_of_this_format_is_refused
                                                                cache_schema/test_format.py::test_a_shard_of_a_newer_format_is_refused_as_such
15  other settings: exit 4 with the fields                      cache_schema/test_store.py::test_another_spec_is_refused_with_the_differing_fields_and_the_command
                                                                cache_schema/test_spec.py::test_every_field_changes_the_digest_and_is_named_as_the_difference
                                                                extract/test_run.py::test_another_layer_is_refused_with_the_field_named
                                                                pipeline/test_cache_commands.py::test_15_repair_with_other_settings_is_refused_with_the_fields
16  other batch size or workers: accepted, same bytes           extract/test_run.py::test_batch_size_does_not_change_the_spec
                                                                cache_schema/test_store.py::test_the_batch_size_does_not_change_a_byte
                                                                extract/test_run.py::test_two_dask_workers_write_the_store_that_one_process_writes
17  video replaced in place: reported, extracted again          cache_schema/test_repair.py::test_17_a_video_replaced_in_place_is_reported
                                                                cache_schema/test_repair.py::test_17_a_replacement_of_the_same_size_is_found_by_its_time_or_by_its_hash
                                                                pipeline/test_cache_commands.py::test_17_a_replaced_video_is_reported_and_its_features_are_made_again_in_every_modality
18  store moved or renamed: works                               cache_schema/test_store.py::test_a_store_can_be_moved_and_pickled
                                                                cache_schema/test_store.py::test_18_no_file_of_a_store_holds_where_it_lies
28  links that lead out: refused                                cache_schema/test_damage.py::test_28_a_folder_of_the_store_that_is_a_link_is_refused
                                                                cache_schema/test_format.py::test_a_link_or_a_pipe_in_the_place_of_a_file_is_refused
                                                                data/test_frames_ids.py::test_links_that_leave_the_folder_are_refused_unless_allowed
31  hostile safetensors: refused, key named                     extract/test_weights.py::test_31_a_hostile_safetensors_header_is_refused_by_file
                                                                extract/test_weights.py::test_a_strict_load_names_what_is_missing_left_over_and_misshapen
32  hostile zarr.json: refused before anything is opened        cache_schema/test_format.py::test_an_array_that_is_not_of_this_format_is_refused_by_field
36  escapes in names: never reach the terminal                  pipeline/test_cache_commands.py::test_36_a_video_nobody_knows_is_answered_with_the_nearest_and_escapes_do_not_reach_the_terminal
                                                                pipeline/test_cli.py::test_names_from_files_cannot_steer_the_terminal
40  NaN, infinity, float16 overflow: the frame is refused       cache_schema/test_store.py::test_a_non_finite_feature_fails_the_video_by_frame
                                                                extract/test_clip.py::test_values_beyond_float16_become_inf_for_the_store_to_refuse
41  teacher vector of length 0: counted, no NaN                 train/test_alignment.py::test_a_zero_target_gives_no_nan
                                                                pipeline/test_cache_commands.py::test_41_inspect_shows_a_video_and_counts_its_zero_vectors
42  out of memory: the batch is halved once, same store         extract/test_interrupted.py::test_42_a_batch_too_large_is_halved_once_for_the_whole_run_and_the_store_is_the_same
47  forked DataLoader after zarr: no deadlock                   cache_schema/test_forked_loader.py::test_47_workers_read_after_the_parent_used_zarr_and_do_not_hang
48  clock jumps: no order depends on the wall clock             cache_schema/test_damage.py::test_48_no_order_and_no_completeness_depends_on_the_times_of_files
51  a million videos: opened in < 1 s, bounded memory           cache_schema/test_million.py::test_51_a_store_of_a_million_videos_opens_in_less_than_a_second_and_bounded_memory
==  ==========================================================  =====================================================
"""  # noqa: E501
