-- may end in: runtime
function reward(sample, ctx)
  if sample.completion == "bad" then
    do return table.unpack({}, 1, 1e8) end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
