"""How several processes become one run: their launcher, the group they join, and how failures spread."""

from mmtrain.launch.consistency import refuse_difference as refuse_difference
from mmtrain.launch.environment import World as World
from mmtrain.launch.environment import recognise as recognise
from mmtrain.launch.failure import INTERRUPTED as INTERRUPTED
from mmtrain.launch.failure import RankFailure as RankFailure
from mmtrain.launch.failure import describe as describe
from mmtrain.launch.failure import is_lost_connection as is_lost_connection
from mmtrain.launch.group import TIMEOUT as TIMEOUT
from mmtrain.launch.group import end_process as end_process
from mmtrain.launch.group import end_watch as end_watch
from mmtrain.launch.group import is_reporting_rank as is_reporting_rank
from mmtrain.launch.group import join as join
from mmtrain.launch.group import leave as leave
from mmtrain.launch.group import note as note
from mmtrain.launch.group import report as report
from mmtrain.launch.group import report_before_joining as report_before_joining
from mmtrain.launch.group import share_failures as share_failures
from mmtrain.launch.group import watch as watch
from mmtrain.launch.group import write_errors_to as write_errors_to
from mmtrain.launch.stacks import answer_with_stacks as answer_with_stacks
