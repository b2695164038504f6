"""Checks that a killed run resumes exactly.

`trial` changes a config for the check, `hook` stops and kills the run from inside, `runs` starts the processes, and
`compare` compares what two runs left behind. The command line is `mmtrain.cli.verify_resume`.
"""
