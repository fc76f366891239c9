"""What can be known before a run: of this machine without torch (`machine`), of all its processes together (`cluster`)."""

from esolm_megatron.doctor.machine import as_dict, as_table, exit_status, report
