"""One GPU: memory, model, scheduler and the step that ties them together."""
