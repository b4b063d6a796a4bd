"""What a study is on disk: records, ledger, files, stores. Plain data, without torch or Ray."""
