-- may end in: memory runtime
function reward(sample, ctx)
  if sample.completion == "bad" then
    do return #table.create(1e8, 0) end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
