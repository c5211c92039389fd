-- may end in: memory runtime
function reward(sample, ctx)
  if sample.completion == "bad" then
    do local t = {} for i = 1, 1e5 do t[i] = string.rep("y", 1000) end return table.concat(t) end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
