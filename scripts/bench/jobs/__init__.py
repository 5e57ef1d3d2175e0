"""Section `job`: whole jobs, by petl and by PEFT's LoRA under Trainer, each in its own process.

    FOLDER/NAME/data/...                  encoded rows and the LoRA config, which all variants share
    FOLDER/NAME/tune/VARIANT/RATES/0.json a run that holds rows out and is scored on them
    FOLDER/NAME/final/VARIANT/RATES/S.json  a timed run on all rows, scored on the test rows
    FOLDER/NAME/rates.json                the scores of the rates, and those that were chosen
    FOLDER/NAME/curves.svg                validation score against processor seconds

Runs that have a file are not run again. Their children import the modules `petl_job`, `trainer_job`
and `sentence_job`; the latter two import nothing of petl.
"""
