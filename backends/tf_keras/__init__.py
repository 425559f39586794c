"""The layers of tf_keras."""
